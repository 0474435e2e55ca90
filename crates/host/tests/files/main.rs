//! Clones and disk accounting on XFS, which shares blocks between files, on a loop device in a mount
//! namespace of the test's own.
//!
//! Needs root, a loop device and mkfs.xfs; without them the tests fail.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "tests")]
mod reflink;
mod world;
