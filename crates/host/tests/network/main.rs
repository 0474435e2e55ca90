//! The network's real effects, each test in a network namespace of its own: frames are put on the
//! guests' wires and looked for on others.
//!
//! Needs root and /dev/net/tun; without them the tests fail.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "tests")]
mod detached;
mod frames;
mod isolation;
mod outside;
mod setup;
mod world;
