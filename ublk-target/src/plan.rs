//! What to do about the devices of a volume that are found at the start: decided here, done elsewhere.
//!
//! A target may be killed at any instant, so every state that a device can be left in has a step. After each step
//! the devices are looked at again.

use libublk_rs_sys as sys;

/// Number of a device: the N of `/dev/ublkbN`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct DeviceId(pub u32);

/// The driver's state of a device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DeviceState {
    /// No disk: not started yet, or stopped.
    Dead,
    /// Its disk takes I/O from a server, or from one whose end the driver has not noticed yet.
    Live,
    /// Its disk waits for a new server.
    Recoverable,
    /// A state that came after this program.
    Unknown(u16),
}

impl DeviceState {
    /// From the driver's number.
    #[must_use]
    pub fn new(raw: u16) -> Self {
        match u32::from(raw) {
            sys::UBLK_S_DEV_DEAD => Self::Dead,
            sys::UBLK_S_DEV_LIVE => Self::Live,
            sys::UBLK_S_DEV_QUIESCED | sys::UBLK_S_DEV_FAIL_IO => Self::Recoverable,
            _ => Self::Unknown(raw),
        }
    }
}

/// A device with the volume's mark.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Found {
    /// Which.
    pub id: DeviceId,
    /// Its state.
    pub state: DeviceState,
    /// The process that has its character device open, if one has.
    pub server: Option<u32>,
}

/// The next step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// There is no device: make one.
    Create,
    /// Stop and delete what a killed target left half made or half deleted, then look again.
    Remove(DeviceId),
    /// Take over from a target that is gone.
    Recover(DeviceId),
    /// The driver has not noticed yet that the target is gone: look again soon.
    Wait(DeviceId),
    /// Another target serves it.
    Served {
        /// The device.
        id: DeviceId,
        /// By this process.
        server: u32,
    },
    /// Two devices carry data of this volume, which no target ever does.
    Ambiguous(DeviceId, DeviceId),
    /// The driver says something that this program doesn't know.
    UnknownState(DeviceId, u16),
}

/// Decides by the devices that have the volume's mark.
#[must_use]
pub fn next_step(found: &[Found]) -> Step {
    // A served device first, in whatever state: its server is between two steps, and nothing of its is to be touched.
    if let Some((id, server)) = found.iter().find_map(|device| device.server.map(|server| (device.id, server))) {
        return Step::Served { id, server };
    }
    let mut usable = None;
    for device in found {
        match device.state {
            DeviceState::Dead => return Step::Remove(device.id),
            DeviceState::Unknown(raw) => return Step::UnknownState(device.id, raw),
            DeviceState::Live | DeviceState::Recoverable => match usable {
                None => usable = Some(*device),
                Some(Found { id: first, .. }) => return Step::Ambiguous(first, device.id),
            },
        }
    }
    match usable {
        None => Step::Create,
        Some(Found { id, state: DeviceState::Live, .. }) => Step::Wait(id),
        Some(Found { id, .. }) => Step::Recover(id),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const A: DeviceId = DeviceId(3);
    const B: DeviceId = DeviceId(7);

    fn found(id: DeviceId, state: DeviceState, server: Option<u32>) -> Found {
        Found { id, state, server }
    }

    #[test]
    fn each_state_and_server_has_its_step() {
        use DeviceState::{Dead, Live, Recoverable, Unknown};
        let served = Step::Served { id: A, server: 9 };
        for (state, alone, with_server) in [
            (Dead, Step::Remove(A), served),
            (Live, Step::Wait(A), served),
            (Recoverable, Step::Recover(A), served),
            (Unknown(9), Step::UnknownState(A, 9), served),
        ] {
            assert_eq!(next_step(&[found(A, state, None)]), alone);
            assert_eq!(next_step(&[found(A, state, Some(9))]), with_server);
        }
        assert_eq!(next_step(&[]), Step::Create);
    }

    #[test]
    fn half_made_devices_go_before_the_good_one_is_used() {
        let good = found(A, DeviceState::Recoverable, None);
        let half = found(B, DeviceState::Dead, None);
        assert_eq!(next_step(&[good, half]), Step::Remove(B));
        assert_eq!(next_step(&[half, good]), Step::Remove(B));
        assert_eq!(next_step(&[good, found(B, DeviceState::Live, None)]), Step::Ambiguous(A, B));
    }

    #[test]
    fn states_are_the_drivers() {
        let states = [0, 1, 2, 3, 4].map(DeviceState::new);
        use DeviceState::{Dead, Live, Recoverable, Unknown};
        assert_eq!(states, [Dead, Live, Recoverable, Recoverable, Unknown(4)]);
    }
}
