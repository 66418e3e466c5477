//! The ublk queue on the replicator's ring: what the kernel asks becomes requests, what comes of them goes back.
//!
//! Invariants:
//! * T1: every tag is in exactly one place: at the kernel (waiting for a request), here (waiting for its turn or for memory), in
//!   service, or ended. A request in service is committed exactly once, or never if the process ends: then the kernel hands it to the next
//!   target.
//! * T2: all FETCH commands go to the kernel in one submission, so that a target killed while it recovers a device leaves
//!   a queue that is either untouched or whole.
//! * T3: the data of requests in service stays within [`DATA_BYTES_MAX`]; what doesn't fit waits in the kernel's own pages.
//! * T4: what waits for its turn under the volume's limits waits in the kernel's own pages, too, and before it waits for memory.
//!
//! It knows no engine and no volume.

mod budget;
mod copy;
mod descriptor;
mod queue;
mod throttle;

pub use budget::DATA_BYTES_MAX;
pub use descriptor::{Asked, Descriptor, Operation};
pub use queue::{QUEUE_DEPTH_MAX, Taken, UblkQueue};
pub use throttle::Throttle;
