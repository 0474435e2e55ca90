//! The control channel between the host and a guest's agent.
//!
//! One byte stream (virtio-serial, later vsock) carries frames. Either end may vanish and come back at any byte:
//! frames are found again by magic and checksum, numbered, acknowledged and sent again after a
//! reconnect. A *host epoch* and a *guest epoch* (random) tell a reconnect from a new server or a new boot:
//! a new host epoch ends all streams of the old one, a new guest epoch starts from zero.
//!
//! ```text
//!   client (host)          agent (guest)         message   what is said
//!        └─────── endpoint ───────┘              session   numbering, acknowledgement, credit; pure
//!              drives a connection               frame     finding frames in bytes
//! ```
//!
//! `config` is the boot-time contract (the config disk); `message` what is said afterwards.
#[cfg(feature = "host")]
pub mod client;
pub mod config;
pub mod endpoint;
pub mod frame;
pub mod message;
pub mod session;
