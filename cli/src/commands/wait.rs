//! `doze wait`: until an instance is in a state.
use doze_api::InstanceState;

use super::common;
use crate::{connection, failure::Failure, output};

/// Wait until an instance reaches a state
///
/// Ends with 0 when it is reached, with 1 when the time is over or the instance rests in another
/// state that it will not leave by itself.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// The state to wait for, for example Running or Stopped
    #[arg(long, default_value_t = InstanceState::Running)]
    state: InstanceState,
    /// How long at most, for example 30s or 2m (5m at most)
    #[arg(long, default_value = "60s")]
    timeout: String,
    /// Print JSON
    #[arg(long)]
    json: bool,
    /// Instance: name, id or beginning of an id
    name: String,
}

pub async fn run(args: Args, options: &connection::Options) -> Result<u8, Failure> {
    let server = connection::connect(options)?;
    let outcome = server
        .client
        .wait_instance(&args.name, args.state, Some(&args.timeout))
        .await
        .map_err(|e| server.explain(&e))?;
    if args.json {
        output::json(&outcome)?;
    } else {
        output::line(outcome.state.as_str())?;
    }
    if outcome.state == args.state {
        return Ok(0);
    }
    let reason = if outcome.timed_out {
        format!("still {} after {}", outcome.state, args.timeout)
    } else {
        let instance = server
            .client
            .get_instance(&args.name)
            .await
            .map_err(|e| server.explain(&e))?;
        format!(
            "{}{}, and stays so until told otherwise",
            outcome.state,
            common::why(&instance)
        )
    };
    Err(Failure::new(format!("{} is {reason}", args.name)))
}
