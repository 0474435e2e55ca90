//! Linux effects, and nothing but effects: files that survive a power cut, processes with an
//! identity, clocks, links, nftables. All `unsafe` of the server lives here, where the kernel or the
//! CPU demands it: between fork and exec, descriptors given to the reactor, the TUN and FIEMAP ioctls, RDTSC.
//!
//! | module | owns |
//! |---|---|
//! | [`files`] | atomic writes, private folders, sparse files, removal, space |
//! | [`clone`] | copies of files that share blocks where they can, and stay sparse where not |
//! | [`usage`] | what files really occupy, shared blocks counted once |
//! | [`process`] | detached processes named by pid + start time + boot id, watched by pidfd |
//! | [`clock`] | boot id, boot time, wall time |
//! | [`conntrack`] | who talks to whom: dumps and events of connection tracking, what counts as activity |
//! | [`net`] | bridge, TAPs, forwarding entries, our nftables table |
//! | [`tsc`] | the frequency of the time-stamp counter |
//! | [`virt`] | whether hardware virtualisation is really usable |
//! | [`watch`] | waiting for a folder's files to change |
//! | [`background`] | low priority for a thread, given back on demand; writing out in steps |
pub mod background;
pub mod clock;
pub mod clone;
pub mod conntrack;
pub mod files;
pub mod net;
pub mod process;
pub mod tsc;
pub mod usage;
pub mod virt;
pub mod watch;
