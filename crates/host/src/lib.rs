//! Linux effects, and nothing but effects: files that survive a power cut, processes with an
//! identity, clocks, links, nftables. All `unsafe` of the server lives here.
pub mod clock;
pub mod files;
pub mod net;
pub mod process;
