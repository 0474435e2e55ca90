//! The real agent and the real client over a unix socket, without a virtual machine.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "tests")]

mod exec;
mod harness;
mod links;
mod restore;
mod terminal;
