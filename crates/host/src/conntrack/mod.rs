//! The kernel's connection tracking: who talks to an instance, so that nobody's instance falls
//! asleep under them.
//!
//! ```text
//!   kernel: nf_conntrack                                         readers
//!     │  dump ────────── [Observer::start_dump] ─┐
//!     │                                          v
//!     └─ NEW, UPDATE, DESTROY ─ [Events] ──> [Tracker]'s task ──> table ──> flows_to(ip)
//!             ENOBUFS, trouble ─ Lost ──────> a fresh dump           └────> watch(ip)
//!                                                                               │
//!                                     [classify]: does the flow count? <────────┘
//! ```
//!
//! Invariants:
//! - the subscription stands before the dump is asked for: between them nothing is missed;
//! - whenever changes may have been missed, reading fails ([`NotInSync`]) until a dump begun later
//!   has been merged, and the caller must take an instance for busy meanwhile;
//! - an error in the order of messages can only keep a flow too long, never drop a live one;
//! - nothing here changes the kernel's table or rules. Tracking is on only if some rule of nftables
//!   in the namespace uses `ct`; the rules of [`crate::net`] do.
//!
//! The messages are parsed here, over a plain socket, and by no crate: of those at hand, nlink reports
//! NEW and UPDATE alike (the kernel tells them apart by the flags `NLM_F_CREATE` and `NLM_F_EXCL` of
//! the netlink header only), and netlink-packet-netfilter builds a tree of allocated attributes per
//! message, of which nine numbers are needed, at tens of thousands of messages per second. What is left
//! is a parser of some hundred lines, which never allocates and is held against random bytes.
//!
//! TCP over IPv4 is observed; IPv6 and UDP are there, and off, in [`Options`].
//!
//! | module | owns |
//! |---|---|
//! | `wire` | the bytes of netlink and ctnetlink |
//! | `socket` | one netlink socket on the reactor |
//! | `observer` | dumps, the subscription, what being lost means |
//! | `table` | the known flows, and how dump and events merge; pure |
//! | `tracker` | the task that keeps the table true, and its readers |
//! | [`classify`] | whether a flow counts as activity; pure |
//! | [`policy`] | networks, ports and durations of a policy in one form; pure |
pub mod classify;
mod error;
mod flow;
mod observer;
pub mod policy;
mod socket;
mod table;
mod tracker;
mod wire;

pub use error::ConntrackError;
pub use flow::{Family, Flow, Protocol, Status, TcpState, Tuple};
pub use observer::{Dump, Event, Events, Lost, Observer, Options};
pub use tracker::{Counters, NotInSync, Tracker, TrackerOptions};
pub use wire::{Malformed, Usage};
