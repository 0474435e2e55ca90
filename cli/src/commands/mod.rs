//! One file per verb: its arguments and what it does. Each returns the exit status.
use clap::Subcommand;

use crate::{connection, failure::Failure};

pub mod auto_standby;
mod common;
mod compression;
pub mod debug;
pub mod doctor;
pub mod drain;
pub mod exec;
pub mod fork;
pub mod image;
pub mod inspect;
pub mod logs;
pub mod phases;
pub mod ps;
pub mod restore;
pub mod rm;
pub mod run;
pub mod schedule;
pub mod serve;
pub mod snapshot;
pub mod snapshot_tool;
pub mod standby;
pub mod start;
pub mod stop;
pub mod token;
pub mod wait;

#[derive(Debug, Subcommand)]
pub enum Command {
    /// Start the server
    Serve(serve::Args),
    /// Make an instance from an image and run it
    Run(run::Args),
    /// List instances
    Ps(ps::Args),
    /// Run a command in a running instance
    Exec(exec::Args),
    /// Show the output of an instance's program
    Logs(logs::Args),
    /// Stop instances
    Stop(stop::Args),
    /// Start stopped instances
    Start(start::Args),
    /// Put instances to sleep: no CPU, no RAM, memory kept on disk
    Standby(standby::Args),
    /// Wake sleeping instances
    Restore(restore::Args),
    /// Put all instances to sleep, for example before a reboot
    Drain(drain::Args),
    /// Make a new instance that goes on where another one is
    Fork(fork::Args),
    /// Keep moments of instances, come back to them, make new instances from them
    #[command(subcommand)]
    Snapshot(snapshot::Command),
    /// Take snapshots of an instance regularly
    #[command(subcommand)]
    Schedule(schedule::Command),
    /// When instances fall asleep by themselves
    #[command(subcommand)]
    AutoStandby(auto_standby::Command),
    /// Delete instances
    Rm(rm::Args),
    /// Show everything about an instance
    Inspect(inspect::Args),
    /// Show where an instance's time went, phase by phase
    Phases(phases::Args),
    /// Wait until an instance reaches a state
    Wait(wait::Args),
    /// Import, list and delete images
    #[command(subcommand)]
    Image(image::Command),
    /// Print an access token for this host's server
    Token(token::Args),
    /// Check whether this host can run microVMs, and how to mend what is missing
    Doctor(doctor::Args),
    /// Compress, decompress and check memory images, without a server
    #[command(subcommand)]
    SnapshotTool(snapshot_tool::Command),
    #[command(subcommand, hide = true)]
    Debug(debug::Command),
}

pub async fn run(command: Command, options: &connection::Options) -> Result<u8, Failure> {
    match command {
        Command::Serve(args) => serve::run(args).await,
        Command::Run(args) => run::run(args, options).await,
        Command::Ps(args) => ps::run(args, options).await,
        Command::Exec(args) => exec::run(args, options).await,
        Command::Logs(args) => logs::run(args, options).await,
        Command::Stop(args) => stop::run(args, options).await,
        Command::Start(args) => start::run(args, options).await,
        Command::Standby(args) => standby::run(args, options).await,
        Command::Restore(args) => restore::run(args, options).await,
        Command::Drain(args) => drain::run(args, options).await,
        Command::Fork(args) => fork::run(args, options).await,
        Command::Snapshot(command) => snapshot::run(command, options).await,
        Command::Schedule(command) => schedule::run(command, options).await,
        Command::AutoStandby(command) => auto_standby::run(command, options).await,
        Command::Rm(args) => rm::run(args, options).await,
        Command::Inspect(args) => inspect::run(args, options).await,
        Command::Phases(args) => phases::run(args, options).await,
        Command::Wait(args) => wait::run(args, options).await,
        Command::Image(command) => image::run(command, options).await,
        Command::Token(args) => token::run(args),
        Command::Doctor(args) => doctor::run(args).await,
        Command::SnapshotTool(command) => snapshot_tool::run(command).await,
        Command::Debug(command) => debug::run(command).await,
    }
}
