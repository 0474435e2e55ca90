//! The monitor contract on real QEMU processes, on both boards, under TCG: no hardware virtualisation needed.
//!
//! The guest is Debian's kernel with an init of 80 lines (`init.c`) that says what it sees.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "tests")]
mod failures;
mod fixture;
mod life;
mod network;
