//! What travels between doze and its clients: wire types of the hypeman 0.28 contract (plus our
//! listed additions), and a typed client.
//!
//! Wire types are never internal types: this crate depends on no other crate of ours, so that a
//! change inside the server cannot change the wire by accident. Requests refuse unknown fields;
//! answers tolerate them, so that an old client reads a newer server.
//!
//! ```text
//!   CLI, tests ──Client──> HTTP/JSON, SSE, WebSocket ──> daemon ──checked conversion──> engine
//! ```
//!
//! Durations travel as Go duration strings (`1h30m0s`), sizes as binary size strings (`1GB` is
//! 1024^3 bytes), timestamps as RFC 3339 UTC strings.
pub mod auto_standby;
pub mod capabilities;
pub mod error;
pub mod exec;
pub mod image;
pub mod instance;
pub mod policy;
pub mod resources;
pub mod size;
pub mod snapshot;

#[cfg(feature = "client")]
pub mod client;

pub use auto_standby::{
    AutoStandbyReason, AutoStandbyState, AutoStandbyStatus, AwakeBecause, UpdateInstanceRequest,
};
pub use capabilities::{
    Capabilities, DefaultRuntime, Health, HealthStatus, HostInfo, ImageSupport, NetworkModel,
    NetworkSupport, Runtime, ServerInfo,
};
#[cfg(feature = "client")]
pub use client::{Client, ClientError};
pub use error::{ErrorBody, ErrorDetail};
pub use exec::{EndOfInputFrame, ExecExit, ExecResize, ExecStart, MAX_FRAME, ResizeFrame};
pub use image::{Image, ImageStatus, ImportEvent};
pub use instance::{
    CreateInstanceRequest, CreateNetwork, Hypervisor, Instance, InstanceNetwork, InstancePhases,
    InstanceState, LogSource, PhaseTransition, StandbyCompression, StandbyCompressionState,
    StandbyInstanceRequest, StartInstanceRequest, WaitForStateResponse,
};
pub use resources::{DiskBreakdown, ResourceAllocation, ResourceStatus, Resources};
pub use size::{SizeError, format_size, parse_size};
pub use snapshot::{
    CompressionState, CreateSnapshotRequest, ForkInstanceRequest, ForkSnapshotRequest,
    RestoreSnapshotRequest, SetSnapshotScheduleRequest, Snapshot, SnapshotKind, SnapshotSchedule,
    SnapshotScheduleRetention, TargetState,
};

/// Version of the contract these types follow.
pub const CONTRACT_VERSION: &str = "0.28.0";

/// Base URL a client uses when it is told none; also where the server listens by default.
pub const DEFAULT_URL: &str = "http://localhost:4973";
