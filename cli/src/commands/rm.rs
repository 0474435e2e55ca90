//! `doze rm`: delete instances with everything they hold.
use doze_api::InstanceState;

use super::common;
use crate::{connection, failure::Failure, output};

#[derive(Debug, clap::Args)]
pub struct Args {
    /// Delete running instances too, without asking their programs to end
    #[arg(short, long)]
    force: bool,
    /// Instances: names, ids or beginnings of ids
    #[arg(required = true)]
    names: Vec<String>,
}

pub async fn run(args: Args, options: &connection::Options) -> Result<u8, Failure> {
    let server = &connection::connect(options)?;
    let force = args.force;
    common::for_each(&args.names, async |name| {
        let explain = |e| server.explain(&e);
        let instance = server.client.get_instance(name).await.map_err(explain)?;
        if !force && !at_rest(instance.state) {
            return Err(Failure::new(format!(
                "{} is {}; stop it first (doze stop {}), or delete it with doze rm -f {}",
                instance.name, instance.state, instance.name, instance.name
            )));
        }
        // By id: the name may have found another instance in the meantime.
        server
            .client
            .delete_instance(&instance.id, force.then_some(false))
            .await
            .map_err(explain)?;
        output::line(&instance.name)
    })
    .await
}

/// Whether deleting it interrupts nothing.
fn at_rest(state: InstanceState) -> bool {
    match state {
        InstanceState::Stopped | InstanceState::Standby => true,
        InstanceState::Created
        | InstanceState::Initializing
        | InstanceState::Running
        | InstanceState::Paused
        | InstanceState::Shutdown
        | InstanceState::Unknown => false,
    }
}
