//! Connection tracking of a real kernel: each test in network namespaces of its own, with a server
//! behind a veth pair in a second one.
//!
//! Needs root, nft(8), ip(8) and a kernel with nf_conntrack_netlink; without them the tests fail.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "tests")]
mod encode;
mod events;
mod tracker;
mod world;
