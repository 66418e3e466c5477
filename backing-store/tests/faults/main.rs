//! What the epoch map does when the disk under it fails, lies or is full.
//!
//! Everything here is deterministic; where chance has a part, its seed is in the message of a failure.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test that finds no value has found a failure")]

mod damage;
mod flips;
mod garbage;
mod openings;
mod poison;
mod rig;
mod space;
