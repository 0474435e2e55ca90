//! Reads what people bring: finds out what it is, which image in it is meant, and what to unpack.
//!
//! ```text
//!   PATH -> Source (folder, tar, compressed tar)
//!             index.json     -> oci_layout:     index -> ... -> manifest -> config + layers
//!             manifest.json  -> docker_archive: entry -> config + layers (manifest derived)
//!                                                |
//!                                                v
//!                                             Plan: digest, config, layers with their diff_ids
//! ```
//!
//! The content decides, never the path's name. An archive that has both (Docker since 25) is read
//! as an OCI layout, whose manifest digest is the one registries know.
use std::io;

use crate::{
    ImageConfig, ImageError, Reference,
    digest::{Digest, HashReader},
    layer::{self, Unpacker},
};

mod docker_archive;
mod oci_layout;
mod platform;
pub(crate) mod source;
mod spec;
#[cfg(test)]
mod tests;

pub(crate) use platform::Wanted;
use source::{Opened, Source};
use spec::{Config, Descriptor, PlatformField};

/// Layers an image may have; the kernel's overlay limit is 500, builders stop at 127.
const MAX_LAYERS: usize = 1000;

/// What an import will do: everything that JSON says, checked; the layers' content is still to be read.
#[derive(Debug)]
pub(crate) struct Plan {
    /// Of the manifest.
    pub digest: Digest,
    pub platform: String,
    pub config: ImageConfig,
    pub layers: Vec<Layer>,
}

#[derive(Debug)]
pub(crate) struct Layer {
    /// What messages call it.
    pub label: String,
    /// Member of the source.
    member: String,
    /// Digest and size of the member as it lies there; a derived manifest has none for it.
    blob: Option<(Digest, u64)>,
    /// Of the decompressed archive.
    diff_id: Digest,
}

/// Finds the image that is meant by name and platform.
pub(crate) fn plan(
    source: &Source,
    reference: &Reference,
    wanted: &Wanted,
) -> Result<Plan, ImageError> {
    if let Some(index) = source.json("index.json")? {
        return oci_layout::plan(source, &index, reference, wanted);
    }
    if let Some(manifest) = source.json("manifest.json")? {
        return docker_archive::plan(source, &manifest, reference, wanted);
    }
    Err(source.format_error(
        "is neither an OCI layout (it has no index.json) nor a docker archive \
         (it has no manifest.json)",
    ))
}

impl Plan {
    /// Reads every layer and compares digest and size with what the manifest says.
    pub(crate) fn verify(&self, source: &Source) -> Result<(), ImageError> {
        for layer in &self.layers {
            let Some((digest, size)) = &layer.blob else {
                continue;
            };
            let (reader, length) = layer.open(source)?;
            let found = if length == *size {
                HashReader::new(reader)
                    .finish()
                    .map_err(|e| layer.read_error(source, e))?
            } else {
                (digest.clone(), length)
            };
            check_size(source, &layer.label, *size, found.1)?;
            check_digest(&format!("layer {}", layer.label), digest, &found.0)?;
        }
        Ok(())
    }

    /// Unpacks all layers in order, comparing each with its diff_id.
    ///
    /// `progress` hears the layer's index and the uncompressed bytes so far.
    pub(crate) fn unpack(
        &self,
        source: &Source,
        mut unpacker: Unpacker,
        progress: &mut dyn FnMut(usize, u64),
    ) -> Result<(), ImageError> {
        for (index, layer) in self.layers.iter().enumerate() {
            let (reader, _) = layer.open(source)?;
            let plain = layer::decompress(reader).map_err(|e| layer.read_error(source, e))?;
            let mut hashed = HashReader::new(plain);
            unpacker.layer(&layer.label, &mut hashed, &mut |bytes| {
                progress(index, bytes)
            })?;
            let (found, _) = hashed.finish().map_err(|e| layer.read_error(source, e))?;
            check_digest(
                &format!("layer {} uncompressed", layer.label),
                &layer.diff_id,
                &found,
            )?;
        }
        unpacker.finish()
    }
}

impl Layer {
    fn open<'s>(&self, source: &'s Source) -> Result<Opened<'s>, ImageError> {
        source.open_member(&self.member)?.ok_or_else(|| {
            source.format_error(format!("layer {} ({}) is missing", self.label, self.member))
        })
    }

    fn read_error(&self, source: &Source, error: io::Error) -> ImageError {
        let what = format!("layer {}", self.label);
        match error.raw_os_error() {
            Some(_) => ImageError::io(format!("read {what} of {}", source.path().display()))(error),
            None => source.format_error(format!("{what}: {error}")),
        }
    }
}

/// The configuration and layers of a manifest, put together and checked against each other.
fn assemble(
    source: &Source,
    digest: Digest,
    config: &Config,
    wanted: &Wanted,
    layers: Vec<Layer>,
) -> Result<Plan, ImageError> {
    let platform = config.platform();
    if !wanted.matches(&platform) {
        return Err(wanted.not_in(&[platform]));
    }
    if layers.is_empty() {
        return Err(source.format_error("the image has no layers"));
    }
    if layers.len() > MAX_LAYERS {
        return Err(source.format_error(format!("the image has more than {MAX_LAYERS} layers")));
    }
    Ok(Plan {
        digest,
        platform: platform::text(&platform),
        config: config.config.clone().unwrap_or_default().into(),
        layers,
    })
}

fn diff_ids(source: &Source, config: &Config, layers: usize) -> Result<Vec<Digest>, ImageError> {
    let ids = config.rootfs.diff_ids.clone().unwrap_or_default();
    if ids.len() != layers {
        let reason = format!(
            "the manifest has {layers} layers, the configuration {} diff_ids",
            ids.len()
        );
        return Err(source.format_error(reason));
    }
    ids.iter()
        .map(|id| parse_digest(source, "diff_id", id))
        .collect()
}

fn parse_digest(source: &Source, what: &str, text: &str) -> Result<Digest, ImageError> {
    text.parse()
        .map_err(|reason| source.format_error(format!("{what}: {reason}")))
}

fn check_digest(what: &str, expected: &Digest, found: &Digest) -> Result<(), ImageError> {
    if expected == found {
        return Ok(());
    }
    Err(ImageError::Digest {
        what: what.to_owned(),
        expected: expected.to_string(),
        found: found.to_string(),
    })
}

fn check_size(source: &Source, what: &str, expected: u64, found: u64) -> Result<(), ImageError> {
    if expected == found {
        return Ok(());
    }
    let reason = format!("{what} has {found} bytes, its descriptor says {expected}");
    Err(source.format_error(reason))
}
