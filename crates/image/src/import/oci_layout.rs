//! OCI image layouts (image-layout.md): `index.json` names manifests, everything lies in
//! `blobs/sha256/` under its own digest.
//!
//! A layout may hold several images (`org.opencontainers.image.ref.name` tells them apart) and each
//! image several platforms (a nested index, or platforms right in `index.json`).
use super::{
    Config, Descriptor, Layer, Plan, Wanted, assemble, check_digest, check_size, diff_ids,
    parse_digest,
    source::Source,
    spec::{Index, Manifest, PlatformField},
};
use crate::{ImageError, Reference, digest::Digest};

/// A tag or a whole name (image-spec annotations.md).
const REF_NAME: &str = "org.opencontainers.image.ref.name";
/// The whole name, as containerd and Docker write it beside the former.
const CONTAINERD_NAME: &str = "io.containerd.image.name";
/// Marks build attestations, which look like images (BuildKit's attestation storage).
const DOCKER_REFERENCE_TYPE: &str = "vnd.docker.reference.type";
/// Indexes may nest; one level is usual.
const MAX_NESTING: usize = 4;
const MAX_MANIFESTS: usize = 10_000;

/// An image manifest found in an index.
struct Candidate {
    descriptor: Descriptor,
    platform: PlatformField,
}

pub(super) fn plan(
    source: &Source,
    index: &[u8],
    reference: &Reference,
    wanted: &Wanted,
) -> Result<Plan, ImageError> {
    let index: Index = source.parse("index.json", index)?;
    let chosen = choose_by_name(source, index.manifests, reference)?;
    let mut candidates = Vec::new();
    collect(source, chosen, MAX_NESTING, &mut candidates)?;
    let best = candidates
        .iter()
        .filter(|c| wanted.matches(&c.platform))
        // The baseline before variants of it (amd64 before amd64/v3).
        .min_by_key(|c| c.platform.variant.is_some());
    let Some(best) = best else {
        let platforms: Vec<_> = candidates.into_iter().map(|c| c.platform).collect();
        return Err(wanted.not_in(&platforms));
    };
    let digest = parse_digest(source, "manifest", &best.descriptor.digest)?;
    let manifest = manifest(source, &best.descriptor)?;
    let config = config(source, &manifest)?;
    let layers = layers(source, &manifest, &config)?;
    assemble(source, digest, &config, wanted, layers)
}

/// With several named images in the layout, the name asked for decides; it need not match when
/// there is only one.
fn choose_by_name(
    source: &Source,
    manifests: Vec<Descriptor>,
    reference: &Reference,
) -> Result<Vec<Descriptor>, ImageError> {
    let names: Vec<&str> = manifests.iter().filter_map(name_of).collect();
    let first = names.first().copied();
    if names.iter().all(|name| Some(*name) == first) {
        return Ok(manifests);
    }
    let listed = names.join(", ");
    let is_meant = |d: &Descriptor| {
        let whole = |key| {
            let named = d
                .annotation(key)
                .and_then(|name| name.parse::<Reference>().ok());
            named.as_ref() == Some(reference)
        };
        whole(CONTAINERD_NAME)
            || whole(REF_NAME)
            || (d.annotation(CONTAINERD_NAME).is_none()
                && reference.tag.as_deref() == d.annotation(REF_NAME))
            || reference.digest.as_deref() == Some(d.digest.as_str())
    };
    let meant: Vec<Descriptor> = manifests.into_iter().filter(is_meant).collect();
    if meant.is_empty() {
        let reason = format!("holds several images and none is {reference}; it has {listed}");
        return Err(source.format_error(reason));
    }
    Ok(meant)
}

fn name_of(descriptor: &Descriptor) -> Option<&str> {
    descriptor
        .annotation(CONTAINERD_NAME)
        .or_else(|| descriptor.annotation(REF_NAME))
}

fn collect(
    source: &Source,
    descriptors: Vec<Descriptor>,
    nesting: usize,
    found: &mut Vec<Candidate>,
) -> Result<(), ImageError> {
    for descriptor in descriptors {
        if descriptor.annotation(DOCKER_REFERENCE_TYPE).is_some() {
            continue;
        }
        if descriptor.is_index() {
            if nesting == 0 {
                return Err(source.format_error("its indexes are nested too deeply"));
            }
            let content = blob(source, "index", &descriptor)?;
            let index: Index = source.parse(&descriptor.digest, &content)?;
            collect(source, index.manifests, nesting - 1, found)?;
        } else if descriptor.is_manifest() {
            let platform = match descriptor.platform.clone() {
                Some(platform) => platform,
                None => {
                    let manifest = manifest(source, &descriptor)?;
                    if !manifest.config.is_config() {
                        continue;
                    }
                    config(source, &manifest)?.platform()
                }
            };
            found.push(Candidate {
                descriptor,
                platform,
            });
        }
        if found.len() > MAX_MANIFESTS {
            return Err(source.format_error("it has more than 10000 manifests"));
        }
    }
    Ok(())
}

fn manifest(source: &Source, descriptor: &Descriptor) -> Result<Manifest, ImageError> {
    let content = blob(source, "manifest", descriptor)?;
    let manifest: Manifest = source.parse(&descriptor.digest, &content)?;
    if manifest.schema_version != 2 {
        let reason = format!(
            "manifest {} has schema version {}; allowed: 2",
            descriptor.digest, manifest.schema_version
        );
        return Err(source.format_error(reason));
    }
    Ok(manifest)
}

fn config(source: &Source, manifest: &Manifest) -> Result<Config, ImageError> {
    if !manifest.config.is_config() {
        let reason = format!(
            "is not a container image: its configuration has type {:?}",
            manifest.config.media_type
        );
        return Err(source.format_error(reason));
    }
    let content = blob(source, "configuration", &manifest.config)?;
    source.parse(&manifest.config.digest, &content)
}

fn layers(source: &Source, manifest: &Manifest, config: &Config) -> Result<Vec<Layer>, ImageError> {
    let diff_ids = diff_ids(source, config, manifest.layers.len())?;
    let descriptors = manifest.layers.iter().zip(diff_ids);
    descriptors
        .map(|(descriptor, diff_id)| {
            let digest = parse_digest(source, "layer", &descriptor.digest)?;
            Ok(Layer {
                label: digest.to_string(),
                member: digest.blob_path(),
                blob: Some((digest, descriptor.size)),
                diff_id,
            })
        })
        .collect()
}

/// A JSON blob, verified.
fn blob(source: &Source, what: &str, descriptor: &Descriptor) -> Result<Vec<u8>, ImageError> {
    let digest = parse_digest(source, what, &descriptor.digest)?;
    let content = source.json(&digest.blob_path())?.ok_or_else(|| {
        source.format_error(format!(
            "{what} {digest} is missing ({})",
            digest.blob_path()
        ))
    })?;
    check_size(
        source,
        &format!("{what} {digest}"),
        descriptor.size,
        content.len() as u64,
    )?;
    check_digest(&format!("{what} {digest}"), &digest, &Digest::of(&content))?;
    Ok(content)
}
