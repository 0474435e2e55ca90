//! The monitor contract on real QEMU processes, on both boards, under TCG: no hardware virtualisation needed.
//!
//! The guest is Debian's kernel with an small init (`init.c`) that says what it sees.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "tests")]
/// Every case on both boards.
macro_rules! on_both_boards {
    ($($case:ident)*) => {
        mod q35 { $(#[tokio::test] async fn $case() { super::$case(doze_vmm::Hypervisor::Qemu).await; })* }
        mod microvm { $(#[tokio::test] async fn $case() { super::$case(doze_vmm::Hypervisor::QemuMicrovm).await; })* }
    };
}

mod failures;
mod fixture;
mod generation;
mod interrupted;
mod life;
mod network;
mod standby;
