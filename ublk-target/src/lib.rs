//! Carrick's ublk target: a volume's block device on this host.
//!
//! One process per attached volume. Its threads:
//! * the *queue thread* runs the replicator's primary and the ublk queue on one ring ([`front`], [`transport`]);
//! * the *main thread* sends commands to the ublk driver, which may block ([`service`], [`driver`]);
//! * threads of the control socket wait for `carrickd` and for people.
//!
//! A crash, a `kill -9` or SIGTERM loses no I/O: requests wait in the kernel until the next target recovers the device.

pub mod child;
pub mod detach;
pub mod driver;
pub mod errand;
pub mod features;
pub mod files;
pub mod front;
pub mod identity;
pub mod mapping;
pub mod openers;
pub mod params;
pub mod plan;
pub mod preflight;
pub mod process;
pub mod progress;
pub mod records;
pub mod service;
pub mod start;
pub mod sysfs;
pub mod transport;
