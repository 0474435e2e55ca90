//! Machine monitors behind one contract.
pub mod boot;
mod contract;
pub mod memory;
pub mod qemu;
pub use contract::*;
