//! `doze standby`: keep an instance's memory on disk and let its machine go.
use doze_api::{StandbyInstanceRequest, policy::SnapshotCompressionConfig};

use super::{common, compression};
use crate::{connection, failure::Failure, output};

#[derive(Debug, clap::Args)]
pub struct Args {
    /// Compress the memory once it is asleep: zstd or lz4, with a level if need be (zstd:3); none: keep it as it is.
    /// Without it, the instance's policy decides, or the server's
    #[arg(long, value_name = compression::FORM, value_parser = compression::wanted)]
    compress: Option<SnapshotCompressionConfig>,
    /// Wait so long before compressing, for example 5m; cut short by whoever wakes it
    #[arg(long, value_name = "DURATION")]
    compress_delay: Option<String>,
    /// Instances: names, ids or beginnings of ids
    #[arg(required = true)]
    names: Vec<String>,
}

pub async fn run(args: Args, options: &connection::Options) -> Result<u8, Failure> {
    let server = &connection::connect(options)?;
    let request = &StandbyInstanceRequest {
        compression: args.compress,
        compression_delay: args.compress_delay,
    };
    common::for_each(&args.names, async |name| {
        let instance = server
            .client
            .standby_instance(name, request)
            .await
            .map_err(|e| server.explain(&e))?;
        output::line(&instance.name)
    })
    .await
}
