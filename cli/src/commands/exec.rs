//! `doze exec`: another command in a running instance.
use super::common;
use crate::{attach, connection, failure::Failure};

/// Run a command in a running instance
///
/// Its exit status is passed through: 126 when it cannot be run, 127 when it is not found, 128 plus
/// the signal's number when a signal ended it, 124 when --timeout was over. 125 means that doze
/// itself failed. Standard error of the command arrives on standard output.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Send standard input to the command
    #[arg(short, long)]
    interactive: bool,
    /// Give the command a terminal
    #[arg(short, long)]
    tty: bool,
    /// Environment variable; KEY alone passes on the value it has here
    #[arg(short, long = "env", value_name = "KEY[=VALUE]", value_parser = common::env_pair)]
    env: Vec<(String, String)>,
    /// Working directory in the guest
    #[arg(short, long, value_name = "DIR")]
    workdir: Option<String>,
    /// Kill the command after this many seconds
    #[arg(long, value_name = "SECONDS")]
    timeout: Option<u32>,
    /// How long to wait for a guest that is still booting
    #[arg(long, value_name = "SECONDS", default_value_t = 30)]
    wait: u32,
    /// Instance: name, id or beginning of an id
    name: String,
    /// Command and its arguments
    #[arg(
        required = true,
        trailing_var_arg = true,
        allow_hyphen_values = true,
        value_name = "COMMAND"
    )]
    command: Vec<String>,
}

pub async fn run(args: Args, options: &connection::Options) -> Result<u8, Failure> {
    let server = connection::connect(options).map_err(Failure::no_program)?;
    let request = attach::Request {
        command: args.command,
        interactive: args.interactive,
        tty: args.tty,
        env: common::map(args.env),
        cwd: args.workdir,
        timeout: args.timeout,
        wait_for_agent: args.wait,
    };
    attach::run(&server, &args.name, request).await
}
