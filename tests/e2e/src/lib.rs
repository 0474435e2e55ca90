//! The end-to-end framework: a real server, real monitors, real guests, driven over the REST API.
//!
//! ```text
//!   outer process ── makes netns doze-e2e-PID (+ -out), a folder ──┐   removes both, whatever happens
//!     └── inner process, inside the netns                          │
//!           preflight ──> harness ──> 2 workers ──> groups ──> cases
//!                                                     └── World: one server, one data dir, one bridge
//! ```
//!
//! Invariants
//! - Nothing is skipped: what the machine lacks fails the run and says how to mend it.
//! - A group's cases run one after another on one server of their own; two groups run side by
//!   side, each with its own bridge and subnet, so they cannot see each other.
//! - Only processes inside our own network namespaces are ever killed, by pid.
//! - Every instance answer any case receives is checked for the phase ledger's invariants
//!   ([`phases`]).
pub mod api;
pub mod checks;
pub mod compression;
pub mod disk;
pub mod exec;
pub mod harness;
pub mod image;
pub mod phases;
pub mod preflight;
pub mod procs;
pub mod redis;
pub mod sample;
pub mod sandbox;
pub mod server;
pub mod traffic;
pub mod witness;
pub mod world;

pub use api::{Api, Reply};
pub use harness::{Case, Group};
pub use sample::Sample;
pub use witness::Witness;
pub use world::World;
