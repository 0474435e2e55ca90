//! Between what travels and what the engine knows. Each conversion is checked, complete, and in
//! one place; no wire type goes further than here.
pub(crate) mod auto_standby;
pub(crate) mod capabilities;
pub(crate) mod compression;
pub(crate) mod create;
pub(crate) mod exec;
pub(crate) mod fields;
pub(crate) mod image;
pub(crate) mod instance;
pub(crate) mod resources;
pub(crate) mod schedule;
pub(crate) mod snapshot;
pub(crate) mod unbuilt;
