//! Linux effects, and nothing but effects: files that survive a power cut, processes with an
//! identity, clocks, links, nftables. All `unsafe` of the server lives here, in the places
//! where the kernel demands it: between fork and exec (`process/spawn.rs`), a pidfd's registration
//! with the reactor (`process/mod.rs`) and the TUN ioctls (`net/tun.rs`).
//!
//! | module | owns |
//! |---|---|
//! | [`files`] | atomic writes, private folders, sparse files, removal, space |
//! | [`process`] | detached processes named by pid + start time + boot id, watched by pidfd |
//! | [`clock`] | boot id, boot time, wall time |
//! | [`net`] | bridge, TAPs, forwarding entries, our nftables table |
//! | [`virt`] | whether hardware virtualisation is really usable |
pub mod clock;
pub mod files;
pub mod net;
pub mod process;
pub mod tsc;
pub mod virt;
pub mod watch;
