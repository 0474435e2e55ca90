//! The server: configuration, HTTP, start and stop. What instances are and do is the engine's.
//!
//! ```text
//!   doze.toml, DOZE_… ──> Config ──> serve ──> lock, secret, socket ──> Engine ──> http::router
//!                                                                          │
//!   SIGTERM, SIGINT ──> stop accepting, drain, Engine::shutdown ───────────┘   VMs keep running
//! ```
mod config;
mod convert;
pub mod debug;
mod dns;
mod http;
mod lock;
mod secret;
mod server;

pub use config::{
    Auth, Config, ConfigError, ConfigErrors, HypervisorConfig, Images, Kernel, Limits, Log,
    LogFormat, Network, Secret,
};
pub use http::{
    contract::{NOT_SERVED, NOT_SERVED_TREES},
    document as openapi_document,
};
pub use lock::LockError;
pub use secret::{SecretError, token};
pub use server::serve;

/// The guest's program: static init and agent. See build.rs.
static GUEST: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/doze-guest"));
