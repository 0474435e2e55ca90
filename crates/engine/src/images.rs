//! Images, as the engine offers them: the store's own calls, plus what instances need of them.
use std::{
    collections::{BTreeMap, HashSet},
    path::PathBuf,
};

use doze_image::{Image, ImageError, ImportEvent};
use tokio::sync::mpsc::UnboundedSender;

use crate::{
    Engine, EngineError,
    context::{blocking, image_error},
};

impl Engine {
    pub async fn image_import(
        &self,
        name: String,
        path: PathBuf,
        platform: Option<String>,
        tags: BTreeMap<String, String>,
        progress: UnboundedSender<ImportEvent>,
    ) -> Result<Image, EngineError> {
        let images = self.shared.ctx.images.clone();
        blocking("importing an image", move || {
            images.import(&name, &path, platform.as_deref(), tags, &mut |event| {
                // Nobody has to watch an import.
                let _ = progress.send(event);
            })
        })
        .await?
        .map_err(image_error)
    }

    pub async fn image_list(&self) -> Result<Vec<Image>, EngineError> {
        let images = self.shared.ctx.images.clone();
        blocking("listing images", move || images.list())
            .await?
            .map_err(image_error)
    }

    pub async fn image_get(&self, name: &str) -> Result<Image, EngineError> {
        self.shared.ctx.image(name).await
    }

    /// Refused while an instance uses it.
    pub async fn image_delete(&self, name: &str) -> Result<(), EngineError> {
        // From here to the end no create is between looking its image up and being in the registry.
        let gate = self.shared.image_gate.clone().write_owned().await;
        match self.shared.ctx.image(name).await {
            Ok(image) => self.check_unused(&image)?,
            // A damaged image cannot be used by anybody and can be deleted all the same.
            Err(EngineError::Image(ImageError::Format { .. })) => {}
            Err(error) => return Err(error),
        }
        let (images, name, used) = (
            self.shared.ctx.images.clone(),
            name.to_owned(),
            self.used_digests(),
        );
        // The gate goes along: a caller that hangs up must not open it while content is going.
        blocking("deleting an image", move || {
            let _gate = gate;
            images.delete(&name, &|d| used.contains(d))
        })
        .await?
        .map_err(image_error)
    }

    fn check_unused(&self, image: &Image) -> Result<(), EngineError> {
        let users: Vec<String> = self
            .list()
            .iter()
            .filter(|view| view.spec.image_digest == image.digest)
            .map(|view| view.name.clone())
            .chain(self.snapshots_of_image(&image.digest))
            .collect();
        if users.is_empty() {
            return Ok(());
        }
        Err(EngineError::ImageInUse {
            name: image.name.clone(),
            instances: users,
        })
    }

    fn used_digests(&self) -> HashSet<String> {
        self.list()
            .iter()
            .map(|view| view.spec.image_digest.clone())
            .chain(self.image_digests_of_snapshots())
            .collect()
    }

    /// Removes image content that neither a name nor an instance needs: what stayed when a name moved on
    /// while an instance used the old content.
    pub(crate) async fn collect_images(&self) {
        let gate = self.shared.image_gate.clone().write_owned().await;
        let (images, used) = (self.shared.ctx.images.clone(), self.used_digests());
        let outcome = blocking("collecting images", move || {
            let _gate = gate;
            images.collect(&|d| used.contains(d))
        });
        match outcome.await {
            Ok(Ok(removed)) if removed.is_empty() => {}
            Ok(Ok(removed)) => tracing::info!(?removed, "removed image content nobody needs"),
            // It costs disk, nothing else; the next start tries again.
            Ok(Err(error)) => tracing::warn!(%error, "collecting images"),
            Err(error) => tracing::warn!(%error, "collecting images"),
        }
    }
}
