//! `doze image ...`: what can be run.
use std::path::PathBuf;

use doze_api::{
    Image, ImportEvent,
    client::{ImportProgress, ImportRequest},
};
use time::OffsetDateTime;

use super::{common, ps};
use crate::{connection, failure::Failure, output, terminal, upload};

#[derive(Debug, clap::Subcommand)]
pub enum Command {
    /// Take an image from this machine: an OCI layout (directory or tar) or a docker archive
    Import(ImportArgs),
    /// List images
    Ls(ListArgs),
    /// Show an image
    Inspect(InspectArgs),
    /// Delete images that no instance uses
    Rm(RemoveArgs),
}

#[derive(Debug, clap::Args)]
pub struct ImportArgs {
    /// Platform to take from an image that has several, for example linux/amd64
    #[arg(long, value_name = "OS/ARCH")]
    platform: Option<String>,
    /// Tag; repeat for several
    #[arg(long = "tag", value_name = "KEY=VALUE", value_parser = common::pair)]
    tags: Vec<(String, String)>,
    /// Print JSON
    #[arg(long)]
    json: bool,
    /// What to call it, for example redis or team/app:1.2
    name: String,
    /// Directory or tar file (what `docker save` and `skopeo copy` write)
    path: PathBuf,
}

#[derive(Debug, clap::Args)]
pub struct ListArgs {
    /// Only images with this tag; repeat for several
    #[arg(long = "tag", value_name = "KEY=VALUE", value_parser = common::pair)]
    tags: Vec<(String, String)>,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

#[derive(Debug, clap::Args)]
pub struct InspectArgs {
    /// Image: any form of its name, or its digest form
    name: String,
}

#[derive(Debug, clap::Args)]
pub struct RemoveArgs {
    /// Images: any form of their names
    #[arg(required = true)]
    names: Vec<String>,
}

pub async fn run(command: Command, options: &connection::Options) -> Result<u8, Failure> {
    match command {
        Command::Import(args) => import(args, options).await,
        Command::Ls(args) => list(args, options).await,
        Command::Inspect(args) => inspect(args, options).await,
        Command::Rm(args) => remove(args, options).await,
    }
}

async fn import(args: ImportArgs, options: &connection::Options) -> Result<u8, Failure> {
    let upload = upload::open(&args.path)?;
    let server = connection::connect(options)?;
    let request = ImportRequest {
        name: args.name,
        platform: args.platform,
        tags: common::map(args.tags),
        length: upload.length,
    };
    let mut bar = Bar::new(upload.length);
    let outcome = server
        .client
        .import_image(&request, upload.stream, |progress| bar.show(&progress))
        .await;
    bar.clear();
    if outcome.is_err()
        && let Some(cause) = upload.packer.failure()
    {
        return Err(Failure::new(format!(
            "cannot read all of {}: {cause}",
            args.path.display()
        )));
    }
    let image = outcome.map_err(|e| server.explain(&e))?;
    if args.json {
        output::json(&image)?
    } else {
        output::line(&format!("{}  {}", image.digest, image.name))?
    }
    Ok(0)
}

/// One line on standard error that is written over; nothing when that is no terminal.
struct Bar {
    total: Option<u64>,
    on: bool,
    /// What stands there now.
    shown: String,
}

impl Bar {
    fn new(total: Option<u64>) -> Self {
        Self {
            total,
            on: terminal::is_terminal(std::io::stderr()),
            shown: String::new(),
        }
    }

    fn show(&mut self, progress: &ImportProgress) {
        let text = describe(progress, self.total);
        if self.on && text != self.shown {
            output::status_line(&text);
            self.shown = text;
        }
    }

    fn clear(&mut self) {
        if !self.shown.is_empty() {
            output::status_line("");
            self.shown.clear();
        }
    }
}

fn describe(progress: &ImportProgress, total: Option<u64>) -> String {
    match progress {
        ImportProgress::Sent { bytes } => match total {
            Some(total) if total > 0 => {
                let percent = (u128::from(*bytes) * 100 / u128::from(total)).min(100);
                format!(
                    "sending {} of {} ({percent} %)",
                    output::bytes(*bytes),
                    output::bytes(total)
                )
            }
            _ => format!("sending {}", output::bytes(*bytes)),
        },
        ImportProgress::Server(ImportEvent::Received { bytes }) => {
            format!("sent {}", output::bytes(*bytes))
        }
        ImportProgress::Server(ImportEvent::Reading { .. }) => "reading the archive".to_owned(),
        ImportProgress::Server(ImportEvent::Layer {
            index,
            count,
            bytes,
        }) => {
            format!(
                "unpacking layer {} of {count} ({})",
                index + 1,
                output::bytes(*bytes)
            )
        }
        ImportProgress::Server(ImportEvent::Building) => "building the root file system".to_owned(),
        ImportProgress::Server(ImportEvent::Image { .. } | ImportEvent::Error { .. }) => {
            "done".to_owned()
        }
    }
}

async fn list(args: ListArgs, options: &connection::Options) -> Result<u8, Failure> {
    let server = connection::connect(options)?;
    let images = server
        .client
        .list_images(&common::map(args.tags))
        .await
        .map_err(|e| server.explain(&e))?;
    if args.json {
        output::json(&images)?;
    } else {
        output::line(&render(&images, OffsetDateTime::now_utc()))?;
    }
    Ok(0)
}

fn render(images: &[Image], now: OffsetDateTime) -> String {
    let row = |image: &Image| {
        [
            ps::familiar(&image.name).to_owned(),
            short_digest(&image.digest).to_owned(),
            image.platform.clone().unwrap_or_else(|| "-".to_owned()),
            image
                .size_bytes
                .map_or_else(|| "-".to_owned(), output::bytes),
            output::age(Some(&image.created_at), now),
        ]
    };
    let rows: Vec<_> = images.iter().map(row).collect();
    output::table(["IMAGE", "DIGEST", "PLATFORM", "SIZE", "AGE"], &rows)
}

fn short_digest(digest: &str) -> &str {
    let hex = digest.strip_prefix("sha256:").unwrap_or(digest);
    hex.get(..12).unwrap_or(hex)
}

async fn inspect(args: InspectArgs, options: &connection::Options) -> Result<u8, Failure> {
    let server = connection::connect(options)?;
    output::json(
        &server
            .client
            .get_image(&args.name)
            .await
            .map_err(|e| server.explain(&e))?,
    )?;
    Ok(0)
}

async fn remove(args: RemoveArgs, options: &connection::Options) -> Result<u8, Failure> {
    let server = &connection::connect(options)?;
    common::for_each(&args.names, async |name| {
        server
            .client
            .delete_image(name)
            .await
            .map_err(|e| server.explain(&e))?;
        output::line(name)
    })
    .await
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn progress_in_words() {
        let sent = |bytes| ImportProgress::Sent { bytes };
        assert_eq!(
            describe(&sent(512), Some(1024)),
            "sending 512 B of 1.0 KiB (50 %)"
        );
        // A directory grows by the headers it gets on the way: never more than all of it.
        assert_eq!(
            describe(&sent(2048), Some(1024)),
            "sending 2.0 KiB of 1.0 KiB (100 %)"
        );
        assert_eq!(describe(&sent(2048), None), "sending 2.0 KiB");
        assert_eq!(describe(&sent(0), Some(0)), "sending 0 B");
        let layer = ImportEvent::Layer {
            index: 0,
            count: 3,
            bytes: 1024,
        };
        assert_eq!(
            describe(&ImportProgress::Server(layer), None),
            "unpacking layer 1 of 3 (1.0 KiB)"
        );
    }

    #[test]
    fn short_digests() {
        assert_eq!(short_digest("sha256:0123456789abcdef"), "0123456789ab");
        assert_eq!(short_digest("odd"), "odd");
    }
}
