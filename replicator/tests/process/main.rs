//! The real `carrick-replica` process, over real sockets and real files: what a peer, an operator and a kill can do to it.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test's helper fails the test that called it")]

mod control;
mod hostile;
mod lifecycle;
mod support;
mod throughput;
mod volume;
