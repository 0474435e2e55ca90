//! Docker archives (`docker save`): `manifest.json` lists images, each with a configuration and
//! layer archives by member name.
//!
//! They have no OCI manifest and so no manifest digest. One is derived, so that the same image
//! always gets the same digest whoever saved it and however its layers are compressed in the
//! archive: the digest of the compact JSON
//!
//! ```text
//! {"schemaVersion":2,"mediaType":"application/vnd.oci.image.manifest.v1+json",
//!  "config":{"mediaType":"application/vnd.oci.image.config.v1+json","digest":D,"size":S},
//!  "layers":[{"mediaType":"application/vnd.oci.image.layer.v1.tar","digest":DIFF_ID,"size":S},...]}
//! ```
//!
//! without any white space, fields in this order, layers uncompressed.
use super::{
    Config, Descriptor, Layer, Plan, Wanted, assemble, check_digest, diff_ids,
    source::Source,
    spec::{ArchiveImage, Manifest, OCI_CONFIG, OCI_LAYER, OCI_MANIFEST},
};
use crate::{
    ImageError, Reference,
    digest::{Digest, HashReader},
    layer,
};

pub(super) fn plan(
    source: &Source,
    manifest: &[u8],
    reference: &Reference,
    wanted: &Wanted,
) -> Result<Plan, ImageError> {
    let images: Vec<ArchiveImage> = source.parse("manifest.json", manifest)?;
    let image = choose_by_name(source, images, reference)?;
    let config_json = source.json(&image.config)?.ok_or_else(|| {
        source.format_error(format!("configuration {:?} is missing", image.config))
    })?;
    let config_digest = Digest::of(&config_json);
    check_config_name(&image.config, &config_digest)?;
    let config: Config = source.parse(&image.config, &config_json)?;

    let members = image.layers.unwrap_or_default();
    let diff_ids = diff_ids(source, &config, members.len())?;
    let layers: Vec<Layer> = members
        .into_iter()
        .zip(diff_ids)
        .map(|(member, diff_id)| Layer {
            label: member.clone(),
            member,
            blob: None,
            diff_id,
        })
        .collect();
    let config_size = config_json.len() as u64;
    let digest = derive(source, (config_digest, config_size), &layers)?;
    assemble(source, digest, &config, wanted, layers)
}

fn choose_by_name(
    source: &Source,
    mut images: Vec<ArchiveImage>,
    reference: &Reference,
) -> Result<ArchiveImage, ImageError> {
    let is_meant = |image: &ArchiveImage| {
        let mut tags = image.repo_tags.iter().flatten();
        tags.any(|tag| tag.parse::<Reference>().as_ref() == Ok(reference))
    };
    let position = match images.len() {
        1 => Some(0),
        _ => images.iter().position(is_meant),
    };
    if let Some(position) = position {
        return Ok(images.swap_remove(position));
    }
    if images.is_empty() {
        return Err(source.format_error("manifest.json lists no image"));
    }
    let tags = images
        .iter()
        .flat_map(|image| image.repo_tags.iter().flatten());
    let listed: Vec<&str> = tags.map(String::as_str).collect();
    let reason = format!(
        "holds several images and none is {reference}; it has {}",
        if listed.is_empty() {
            "no names".to_owned()
        } else {
            listed.join(", ")
        }
    );
    Err(source.format_error(reason))
}

/// Writers name the configuration after its digest; then it must be true.
fn check_config_name(member: &str, found: &Digest) -> Result<(), ImageError> {
    let name = member.rsplit('/').next().unwrap_or(member);
    let name = name.strip_suffix(".json").unwrap_or(name);
    match format!("sha256:{name}").parse::<Digest>() {
        Ok(expected) => check_digest(&format!("configuration {member}"), &expected, found),
        Err(_) => Ok(()),
    }
}

/// The derived manifest's digest. Reads every layer, since only its uncompressed size is unknown;
/// its diff_id is verified on the way.
fn derive(
    source: &Source,
    (config, config_size): (Digest, u64),
    layers: &[Layer],
) -> Result<Digest, ImageError> {
    let descriptor = |media_type: &str, digest: &Digest, size| Descriptor {
        media_type: media_type.to_owned(),
        digest: digest.to_string(),
        size,
        platform: None,
        annotations: None,
    };
    let mut descriptors = Vec::new();
    for layer in layers {
        let (reader, _) = layer.open(source)?;
        let (found, size) = layer::decompress(reader)
            .and_then(|plain| HashReader::new(plain).finish())
            .map_err(|e| layer.read_error(source, e))?;
        check_digest(
            &format!("layer {} uncompressed", layer.label),
            &layer.diff_id,
            &found,
        )?;
        descriptors.push(descriptor(OCI_LAYER, &layer.diff_id, size));
    }
    let manifest = Manifest {
        schema_version: 2,
        media_type: Some(OCI_MANIFEST.to_owned()),
        config: descriptor(OCI_CONFIG, &config, config_size),
        layers: descriptors,
    };
    let json = serde_json::to_vec(&manifest)
        .map_err(|e| source.format_error(format!("its manifest cannot be derived: {e}")))?;
    Ok(Digest::of(&json))
}
