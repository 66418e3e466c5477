//! What this process asks of the kernel for itself.

use std::io;

use rustix::process::{Resource, Rlimit};
use rustix::thread::CapabilitySet;

/// From `linux/prctl.h`.
const PR_SET_IO_FLUSHER: libc::c_int = 57;

/// Makes the process fit to serve a disk that its own host may swap to. Call it before threads are made: they inherit it.
/// What the kernel refuses is logged: a target without it is better than none.
pub fn prepare() {
    // SAFETY: takes a number. Memory that this process needs is not freed by writing to the disk that it serves.
    if unsafe { libc::prctl(PR_SET_IO_FLUSHER, 1, 0, 0, 0) } != 0 {
        tracing::warn!(error = %io::Error::last_os_error(), "can't be an I/O flusher: a host short of memory may hang");
    }
    if let Err(error) = std::fs::write("/proc/self/oom_score_adj", "-1000") {
        tracing::warn!(%error, "can't be exempt from the out-of-memory killer");
    }
    // While a core is written the kernel keeps the character device open, and nobody can recover the device.
    if let Err(error) = rustix::process::setrlimit(Resource::Core, Rlimit { current: Some(0), maximum: Some(0) }) {
        tracing::warn!(%error, "can't switch off core dumps: they would delay recovery");
    }
}

/// Takes CAP_SYS_ADMIN from the calling thread, for good.
///
/// # Errors
/// The kernel's.
pub fn drop_sys_admin() -> io::Result<()> {
    let mut sets = rustix::thread::capabilities(None)?;
    sets.effective.remove(CapabilitySet::SYS_ADMIN);
    sets.permitted.remove(CapabilitySet::SYS_ADMIN);
    sets.inheritable.remove(CapabilitySet::SYS_ADMIN);
    Ok(rustix::thread::set_capabilities(None, sets)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_thread_loses_the_privilege_alone() {
        let has = || rustix::thread::capabilities(None).unwrap().permitted.contains(CapabilitySet::SYS_ADMIN);
        let before = has();
        std::thread::spawn(move || {
            drop_sys_admin().unwrap();
            assert!(!has());
        })
        .join()
        .unwrap();
        assert_eq!(has(), before);
    }
}
