//! Everything an engine call can fail with. The daemon maps these to HTTP in one place.
use doze_agent::client::AgentError;
use doze_image::ImageError;
use doze_lifecycle::{Refusal, State};

impl EngineError {
    /// The same answer for somebody who joined the operation.
    #[must_use]
    pub fn repeated(&self) -> EngineError {
        use EngineError as E;
        match self {
            E::NotFound { what, id } => E::NotFound {
                what,
                id: id.clone(),
            },
            E::Ambiguous { prefix, matches } => E::Ambiguous {
                prefix: prefix.clone(),
                matches: matches.clone(),
            },
            E::NameTaken { name, holder } => E::NameTaken {
                name: name.clone(),
                holder: holder.clone(),
            },
            E::SnapshotNameTaken { name, holder } => E::SnapshotNameTaken {
                name: name.clone(),
                holder: holder.clone(),
            },
            E::InvalidField {
                code,
                field,
                value,
                allowed,
            } => E::InvalidField {
                code,
                field: field.clone(),
                value: value.clone(),
                allowed: allowed.clone(),
            },
            E::InvalidState { state, refusal } => E::InvalidState {
                state: *state,
                refusal: *refusal,
            },
            E::ImageNotFound { name } => E::ImageNotFound { name: name.clone() },
            E::ImageInUse { name, instances } => E::ImageInUse {
                name: name.clone(),
                instances: instances.clone(),
            },
            E::Capacity {
                resource,
                wanted,
                available,
                limit,
            } => E::Capacity {
                resource,
                wanted: wanted.clone(),
                available: available.clone(),
                limit: limit.clone(),
            },
            E::Snapshot { reason } => E::Snapshot {
                reason: reason.clone(),
            },
            E::BrokenStream { reason } => E::BrokenStream {
                reason: reason.clone(),
            },
            E::NotImportable { reason } => E::NotImportable {
                reason: reason.clone(),
            },
            E::DependencyMissing { what, mend } => E::DependencyMissing {
                what: what.clone(),
                mend: mend.clone(),
            },
            E::NotImplemented { field } => E::NotImplemented {
                field: field.clone(),
            },
            E::Interrupted { by } => E::Interrupted { by },
            E::Asleep { state } => E::Asleep { state: *state },
            E::Agent(error) => E::Agent(error.clone()),
            E::ShuttingDown => E::ShuttingDown,
            E::Image(error) => E::Internal {
                context: "the operation this command joined".to_owned(),
                reason: error.to_string(),
            },
            E::Internal { context, reason } => E::Internal {
                context: context.clone(),
                reason: reason.clone(),
            },
        }
    }
}

#[derive(Debug, thiserror::Error)]
pub enum EngineError {
    /// `what` is `instance`, `image`, `snapshot` or `schedule`.
    #[error("{what} {id:?} does not exist")]
    NotFound { what: &'static str, id: String },
    #[error("{prefix:?} is a prefix of several ids: {}", matches.join(", "))]
    Ambiguous {
        prefix: String,
        matches: Vec<String>,
    },
    #[error("name: {name:?} is taken by instance {holder}; choose another or delete that one")]
    NameTaken { name: String, holder: String },
    #[error(
        "name: {name:?} is taken by the snapshot {holder} of the same instance; choose another or delete that one"
    )]
    SnapshotNameTaken { name: String, holder: String },
    /// A request field holds a value that is not allowed. `code` is one of the contract's codes
    /// (`invalid_field`, `invalid_name`, `invalid_size`, `invalid_platform`, `missing_field`).
    #[error("{field}: {value} is not allowed; allowed: {allowed}")]
    InvalidField {
        code: &'static str,
        field: String,
        value: String,
        allowed: String,
    },
    /// The admission table refuses the command in this state.
    #[error("{refusal}")]
    InvalidState { state: State, refusal: Refusal },
    #[error("image {name:?} is not on this host; import it first (doze image import NAME PATH)")]
    ImageNotFound { name: String },
    #[error("image {name:?} is used by {}; delete them first", instances.join(", "))]
    ImageInUse {
        name: String,
        instances: Vec<String>,
    },
    #[error("not enough {resource}: {wanted} wanted, {available} available ({limit})")]
    Capacity {
        resource: &'static str,
        wanted: String,
        available: String,
        limit: String,
    },
    /// A snapshot cannot be used; it is left as it is.
    #[error(
        "the snapshot cannot be restored: {reason}; it is kept. Mend this and restore again, or boot from disk, which loses the memory: doze start --discard-memory"
    )]
    Snapshot { reason: String },
    /// What was sent is no exported snapshot, or not a whole one.
    #[error("the snapshot's stream is refused: {reason}; nothing of it was kept")]
    BrokenStream { reason: String },
    /// An exported snapshot that this host cannot use as it is.
    #[error("the snapshot cannot be imported: {reason}; nothing of it was kept")]
    NotImportable { reason: String },
    /// Kernel, QEMU, nft or another thing of the host is missing; says how to mend it.
    #[error("{what}; {mend}")]
    DependencyMissing { what: String, mend: String },
    #[error("{field} is known but not built yet; leave it out or give it its no-effect value")]
    NotImplemented { field: String },
    /// Too late to keep it awake.
    #[error(
        "state: cannot hold an instance awake that is {state} and in standby or on its way there; restore it first"
    )]
    Asleep { state: State },
    /// Another command interrupted this one (stop or delete during start).
    #[error("interrupted by {by}")]
    Interrupted { by: &'static str },
    #[error(transparent)]
    Agent(#[from] AgentError),
    #[error(transparent)]
    Image(#[from] ImageError),
    #[error("the server is shutting down")]
    ShuttingDown,
    /// Something of the host failed: what was being done, and why.
    #[error("{context}: {reason}")]
    Internal { context: String, reason: String },
}
