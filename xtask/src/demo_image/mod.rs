//! Builds the demo image: busybox and redis from Debian's packages, as an OCI layout.
//!
//! Nothing but apt is needed: no registry, no container tool. The layout is reproducible: the same
//! packages and the same recipe give the same manifest digest.
//!
//! ```text
//!   apt-cache depends -> closure -> apt-get download -> dpkg-deb -x -> one folder
//!                                                                        |
//!     layer 1: busybox, its applets, /etc, empty folders   <-------------+
//!     layer 2: redis, the libraries its programs need (ELF NEEDED), /etc/passwd again, /data
//!                                                                        v
//!     blobs/sha256/..., index.json (with the inputs' hash: the next run compares it and is done)
//! ```
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, ensure};
use sha2::{Digest as _, Sha256};

mod elf;
mod layout;
mod packages;
mod recipe;
mod tree;

/// Build the demo image (busybox and redis) as an OCI layout from Debian packages
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Folder that becomes the OCI layout
    #[arg(long)]
    out: PathBuf,
    /// Folder that keeps the downloaded packages [default: "packages" beside OUT]
    #[arg(long)]
    cache: Option<PathBuf>,
}

pub fn run(args: &Args) -> Result<()> {
    let cache = match &args.cache {
        Some(cache) => cache.clone(),
        None => args
            .out
            .parent()
            .context("--out has no parent folder; name one with --cache")?
            .join("packages"),
    };
    let packages = match packages::resolve() {
        Ok(packages) => packages,
        Err(e) if layout::inputs(&args.out)?.is_some() => {
            println!("{e:#}");
            println!("demo image: keeping {} as it is", args.out.display());
            return Ok(());
        }
        Err(e) => return Err(e),
    };
    let inputs = hash_inputs(&packages);
    if layout::inputs(&args.out)?.as_deref() == Some(inputs.as_str()) {
        println!("demo image: {} is complete and current", args.out.display());
        return Ok(());
    }
    build(&args.out, &cache, &packages, &inputs)
}

fn build(out: &Path, cache: &Path, packages: &[packages::Package], inputs: &str) -> Result<()> {
    let debs = packages::download(packages, cache)?;
    let work = cache.join(format!("unpacked-{}", std::process::id()));
    let built = packages::unpack(&debs, &work)
        .and_then(|()| recipe::layers(&work))
        .and_then(|layers| {
            recipe::check(
                &layers,
                &cache.join(format!("check-{}", std::process::id())),
            )?;
            layout::write(out, &layers, &packages::architecture()?, inputs)
        });
    let removed = packages::remove(&work);
    let report = built?;
    removed?;
    println!("demo image: {report}");
    Ok(())
}

/// Packages and recipe: what the layout depends on.
fn hash_inputs(packages: &[packages::Package]) -> String {
    let mut hash = Sha256::new();
    for package in packages {
        hash.update(format!("{} {}\n", package.file, package.sha256));
    }
    for source in [
        include_str!("mod.rs"),
        include_str!("elf.rs"),
        include_str!("layout.rs"),
        include_str!("packages.rs"),
        include_str!("recipe.rs"),
        include_str!("tree.rs"),
    ] {
        hash.update(source);
    }
    hex::encode(hash.finalize())
}

/// Runs a program to its end and answers its output.
fn output(command: &mut std::process::Command) -> Result<String> {
    let name = command.get_program().to_string_lossy().into_owned();
    let output = command.output().with_context(|| format!("run {name}"))?;
    ensure!(
        output.status.success(),
        "{name} ended with {}: {}",
        output.status,
        String::from_utf8_lossy(&output.stderr).trim()
    );
    String::from_utf8(output.stdout).with_context(|| format!("output of {name}"))
}
