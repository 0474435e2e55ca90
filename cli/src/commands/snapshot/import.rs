//! `doze snapshot import`: a snapshot that another host exported.
use std::path::{Path, PathBuf};

use tokio::io::AsyncRead;

use crate::{
    connection::{self, Server},
    failure::Failure,
    output,
    progress::Bytes,
    terminal,
};

#[derive(Debug, clap::Args)]
pub struct Args {
    /// Another name than it had
    #[arg(long, value_name = "NAME")]
    name: Option<String>,
    /// Print JSON
    #[arg(long)]
    json: bool,
    /// What `doze snapshot export` wrote; - is standard input
    #[arg(value_name = "FILE")]
    file: PathBuf,
}

pub async fn run(args: Args, options: &connection::Options) -> Result<u8, Failure> {
    if args.file == Path::new("-") {
        if terminal::is_terminal(std::io::stdin()) {
            return Err(Failure::new(
                "nobody types an exported snapshot; name a file, or redirect standard input",
            ));
        }
        let server = connection::connect(options)?;
        return send(args, &server, tokio::io::stdin(), None).await;
    }
    let cannot =
        |e: std::io::Error| Failure::new(format!("cannot read {}: {e}", args.file.display()));
    let file = std::fs::File::open(&args.file).map_err(cannot)?;
    let meta = file.metadata().map_err(cannot)?;
    let length = meta.is_file().then_some(meta.len());
    let server = connection::connect(options)?;
    send(args, &server, tokio::fs::File::from_std(file), length).await
}

async fn send(
    args: Args,
    server: &Server,
    upload: impl AsyncRead + Send + Unpin + 'static,
    length: Option<u64>,
) -> Result<u8, Failure> {
    let mut progress = Bytes::new("sent", length);
    let imported = server
        .client
        .import_snapshot(args.name.as_deref(), upload, length, |sent| {
            progress.set(sent);
        })
        .await;
    drop(progress);
    let snapshot = imported.map_err(|e| server.explain(&e))?;
    match args.json {
        true => output::json(&snapshot)?,
        false => output::line(&snapshot.id)?,
    }
    Ok(0)
}
