//! From the image store to the wire.
use doze_api::{Image, ImageStatus, ImportEvent};

/// Everything in the store is ready: an image appears there only when it is whole.
pub(crate) fn image(image: doze_image::Image) -> Image {
    let config = image.config;
    Image {
        name: image.name,
        digest: image.digest,
        status: ImageStatus::Ready,
        created_at: image.created_at,
        platform: Some(image.platform),
        size_bytes: Some(image.size_bytes),
        entrypoint: config.entrypoint,
        cmd: config.cmd,
        env: config
            .env
            .iter()
            .map(|pair| pair.split_once('=').unwrap_or((pair, "")))
            .map(|(name, value)| (name.to_owned(), value.to_owned()))
            .collect(),
        working_dir: config.working_dir,
        error: None,
        queue_position: None,
        tags: image.tags,
    }
}

/// `None` for what the final line says better.
pub(crate) fn import_event(event: doze_image::ImportEvent) -> Option<ImportEvent> {
    match event {
        // The path is the server's own staging file and tells a client nothing.
        doze_image::ImportEvent::Reading { .. } => Some(ImportEvent::Reading {
            source: "the upload".to_owned(),
        }),
        doze_image::ImportEvent::Layer {
            index,
            count,
            bytes,
        } => Some(ImportEvent::Layer {
            index,
            count,
            bytes,
        }),
        doze_image::ImportEvent::Building => Some(ImportEvent::Building),
        doze_image::ImportEvent::Done { .. } => None,
    }
}
