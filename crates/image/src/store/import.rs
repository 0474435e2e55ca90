//! The import: from somebody's files to a name in the store.
use std::{
    collections::BTreeMap,
    fs::{self, File},
    io,
    path::Path,
};

use super::{
    BLOBS, ImageStore, RECORD, ROOTFS, name_to_point, now,
    record::{self, BlobRecord},
    stage::{Stage, StoreLock},
    sync_folder,
};
use crate::{
    Image, ImageError, ImportEvent, Reference,
    digest::{Digest, HashReader},
    import::{self, Plan, Wanted, source::Source},
    layer::Unpacker,
    rootfs,
};

/// The unpacked tree, inside the stage folder.
const TREE: &str = "tree";
/// The content as it will be in `blobs/`, inside the stage folder.
const BLOB: &str = "blob";

impl ImageStore {
    /// Imports from an OCI layout (directory or tar) or a docker archive, and points `name` at it.
    /// Nothing is visible before everything is durable.
    ///
    /// `platform` is `os/architecture[/variant]`, by default `linux/amd64`. With several images in
    /// the source the one called `name` is taken. A `name` with a digest must be what the source
    /// holds. `tags` replace those the name had. Content already here is verified in the source but
    /// not unpacked again.
    ///
    /// # Errors
    /// Every kind of [`ImageError`] but `NotFound`; nothing of the import is left then.
    pub fn import(
        &self,
        name: &str,
        path: &Path,
        platform: Option<&str>,
        tags: BTreeMap<String, String>,
        progress: &mut dyn FnMut(ImportEvent),
    ) -> Result<Image, ImageError> {
        let reference = name_to_point(name)?;
        let wanted = Wanted::parse(platform)?;
        progress(ImportEvent::Reading {
            source: path.display().to_string(),
        });
        let stage = Stage::create(&self.root)?;
        let imported = self.import_in(&stage, &reference, path, &wanted, tags, progress);
        let removed = stage.remove();
        match (imported, removed) {
            (Ok(image), Ok(())) => {
                progress(ImportEvent::Done {
                    digest: image.digest.clone(),
                });
                Ok(image)
            }
            // The image is there; what is left behind goes at the next open().
            (Ok(image), Err(e)) => {
                tracing::warn!(error = &e as &dyn std::error::Error, "stage folder stays");
                Ok(image)
            }
            (Err(cause), Ok(())) => Err(cause),
            (Err(cause), Err(e)) => {
                tracing::warn!(error = &e as &dyn std::error::Error, "stage folder stays");
                Err(cause)
            }
        }
    }

    fn import_in(
        &self,
        stage: &Stage,
        reference: &Reference,
        path: &Path,
        wanted: &Wanted,
        tags: BTreeMap<String, String>,
        progress: &mut dyn FnMut(ImportEvent),
    ) -> Result<Image, ImageError> {
        let source = Source::open(path, stage.path(), self.limits.bytes)?;
        let plan = import::plan(&source, reference, wanted)?;
        let digest = plan.digest.to_string();
        if let Some(expected) = reference.digest.as_ref().filter(|d| **d != digest) {
            return Err(ImageError::Digest {
                what: format!("manifest in {}", path.display()),
                expected: expected.clone(),
                found: digest,
            });
        }
        plan.verify(&source)?;
        if !self.is_whole(&plan.digest)? {
            self.stage_blob(stage, &source, &plan, reference, progress)?;
        }
        let _lock = StoreLock::take(&self.root)?;
        self.publish(stage, &plan.digest)?;
        let record = self.write_ref(reference, &digest, tags)?;
        self.image(record)
    }

    /// Whether the content is here; damaged content is not, so that importing again mends it.
    fn is_whole(&self, digest: &Digest) -> Result<bool, ImageError> {
        match self.read_blob(digest) {
            Ok(blob) => Ok(blob.is_some()),
            Err(e @ ImageError::Format { .. }) => {
                tracing::warn!(
                    error = &e as &dyn std::error::Error,
                    "replacing damaged content"
                );
                Ok(false)
            }
            Err(e) => Err(e),
        }
    }

    /// Builds the content in the stage folder, durable but not visible.
    fn stage_blob(
        &self,
        stage: &Stage,
        source: &Source,
        plan: &Plan,
        reference: &Reference,
        progress: &mut dyn FnMut(ImportEvent),
    ) -> Result<(), ImageError> {
        let tree = stage.folder(TREE)?;
        let unpacker = Unpacker::new(&tree, source.path(), self.limits)?;
        let count = plan.layers.len();
        plan.unpack(source, unpacker, &mut |index, bytes| {
            progress(ImportEvent::Layer {
                index,
                count,
                bytes,
            });
        })?;
        progress(ImportEvent::Building);
        let blob = stage.folder(BLOB)?;
        let file = Path::new(BLOB).join(ROOTFS);
        rootfs::build(
            self.mkfs.as_deref(),
            stage.path(),
            TREE,
            &file,
            &plan.digest,
        )?;
        let file = blob.join(ROOTFS);
        let (rootfs_digest, size_bytes) = File::open(&file)
            .and_then(|file| HashReader::new(file).finish())
            .map_err(ImageError::io(format!("read {}", file.display())))?;
        let digest = plan.digest.to_string();
        let record = BlobRecord {
            version: record::VERSION,
            name: reference.at_digest(&digest).to_string(),
            digest,
            created_at: now()?,
            platform: plan.platform.clone(),
            size_bytes,
            rootfs_digest: rootfs_digest.to_string(),
            config: plan.config.clone(),
        };
        record::write(&blob.join(RECORD), &record)
    }

    /// Makes staged content visible. The store is locked.
    fn publish(&self, stage: &Stage, digest: &Digest) -> Result<(), ImageError> {
        let staged = stage.path().join(BLOB);
        let path = self.blob_path(digest);
        let failed = || ImageError::io(format!("publish {}", path.display()));
        if self.is_whole(digest)? {
            // Another import of the same content was faster, or it was here all the time.
            return Ok(());
        }
        if !staged.exists() {
            // It was here and whole a moment ago.
            return Err(failed()(io::Error::new(
                io::ErrorKind::NotFound,
                "the content was deleted while it was being imported; import it again",
            )));
        }
        if path.exists() {
            let damaged = stage.path().join("damaged");
            fs::rename(&path, &damaged).map_err(failed())?;
        }
        fs::rename(&staged, &path).map_err(failed())?;
        sync_folder(&self.root.join(BLOBS))
    }
}
