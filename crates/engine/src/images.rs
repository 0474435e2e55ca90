//! Images, as the engine offers them: the store's own calls, plus what instances need of them.
use std::{collections::BTreeMap, path::PathBuf};

use doze_image::{Image, ImportEvent};
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
        let image = self.shared.ctx.image(name).await?;
        let users: Vec<_> = self
            .list()
            .into_iter()
            .filter(|view| view.spec.image_digest == image.digest)
            .collect();
        // Another reference may keep the content; the last one must not go while it is in use.
        let references = self.image_list().await?;
        let others = references
            .iter()
            .any(|i| i.digest == image.digest && i.name != image.name);
        if !users.is_empty() && !others {
            return Err(EngineError::ImageInUse {
                name: image.name,
                instances: users.iter().map(|view| view.name.clone()).collect(),
            });
        }
        let in_use: std::collections::HashSet<String> = self
            .list()
            .iter()
            .map(|view| view.spec.image_digest.clone())
            .collect();
        let (images, name) = (self.shared.ctx.images.clone(), name.to_owned());
        blocking("deleting an image", move || {
            images.delete(&name, &|digest| in_use.contains(digest))
        })
        .await?
        .map_err(image_error)
    }
}
