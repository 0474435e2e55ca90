//! The images of this host, content-addressed.
//!
//! ```text
//!   <root>/lock                       flock: held for short steps (publish, delete, stage)
//!          stage/import-XXXXXX/       an import at work, flocked by it; removed at its end or,
//!                                     after a crash, by the next open()
//!          blobs/sha256-<hex>/        one per manifest digest, immutable
//!                rootfs.erofs         mode 0444
//!                image.json           config, platform, size, checksum
//!          refs/<name>.json           one per name: the digest it points at
//!
//!   import:  stage -> fsync -> lock { rename to blobs/ -> fsync -> write refs/ } -> visible
//!   delete:  lock { remove refs/ -> no other name, not in use? -> rename blob to stage/ } -> remove
//! ```
//!
//! Content is visible before its name and goes after it, so a name always leads to whole content.
//! Content without a name is either used by an instance or waits for [`ImageStore::collect`].
use std::{
    collections::{BTreeMap, BTreeSet},
    fs::{self, File},
    io,
    path::{Path, PathBuf},
};

use time::{OffsetDateTime, format_description::well_known::Rfc3339};

use crate::{
    Image, ImageError, Limits, Reference, ReferenceError,
    digest::{Digest, HashReader},
};

mod import;
mod record;
mod stage;
#[cfg(test)]
mod tests;

use record::{BlobRecord, RefRecord};
use stage::{Stage, StoreLock};

const BLOBS: &str = "blobs";
const REFS: &str = "refs";
const ROOTFS: &str = "rootfs.erofs";
const RECORD: &str = "image.json";

/// All images below one folder. Cheap to clone; methods block, call them off the async threads.
///
/// Several processes may work on one store at the same time.
#[derive(Debug, Clone)]
pub struct ImageStore {
    root: PathBuf,
    limits: Limits,
    mkfs: Option<PathBuf>,
}

impl ImageStore {
    /// Opens or creates the store and removes what an interrupted import left.
    ///
    /// # Errors
    /// `Io` when the folder cannot be created or is open to other users.
    pub fn open(root: &Path) -> Result<Self, ImageError> {
        for folder in [
            root.to_owned(),
            root.join("stage"),
            root.join(BLOBS),
            root.join(REFS),
        ] {
            doze_host::files::create_private_dir(&folder)
                .map_err(ImageError::io(format!("create {}", folder.display())))?;
        }
        let store = Self {
            root: root.to_owned(),
            limits: Limits::default(),
            mkfs: None,
        };
        stage::clean(root)?;
        store.clean_refs()?;
        Ok(store)
    }

    /// Replaces the default limits of what an image may grow to.
    pub fn with_limits(mut self, limits: Limits) -> Self {
        self.limits = limits;
        self
    }

    /// Replaces the search for `mkfs.erofs` in `PATH`.
    pub fn with_mkfs(mut self, program: PathBuf) -> Self {
        self.mkfs = Some(program);
        self
    }

    /// Any equivalent form of the name: short, tagged, `name@sha256:...`, `name:tag@sha256:...`.
    ///
    /// The digest form finds content that some name of the same repository points at; the answer
    /// carries the digest form then. A bare `sha256:<64 hex>` is [`ImageStore::by_digest`].
    pub fn get(&self, name: &str) -> Result<Image, ImageError> {
        if name.parse::<Digest>().is_ok() {
            return self.by_digest(name);
        }
        let reference: Reference = name.parse()?;
        if reference.digest.is_none() {
            return match self.read_ref(&reference)? {
                Some(record) => self.image(record),
                None => Err(ImageError::NotFound(reference.to_string())),
            };
        }
        let name = reference.to_string();
        match self.refs_at_digest(&reference)?.into_iter().next() {
            Some(record) => self.image(RefRecord { name, ..record }),
            None => Err(ImageError::NotFound(name)),
        }
    }

    /// Content by its manifest digest, also when no name points at it any more (an instance made
    /// from a name that has since moved or gone). `name` is then the digest form of its first name.
    pub fn by_digest(&self, digest: &str) -> Result<Image, ImageError> {
        let not_found = || ImageError::NotFound(digest.to_owned());
        let parsed: Digest = digest.parse().map_err(|reason| ReferenceError {
            input: digest.to_owned(),
            reason,
        })?;
        let named = self.whole_refs()?.into_iter().find(|r| r.digest == digest);
        if let Some(record) = named {
            return self.image(record);
        }
        let blob = self.read_blob(&parsed)?.ok_or_else(not_found)?;
        self.image(RefRecord {
            version: record::VERSION,
            name: blob.name,
            digest: digest.to_owned(),
            created_at: blob.created_at,
            tags: BTreeMap::new(),
        })
    }

    /// All references, sorted by name. Damaged ones are left out and logged; [`ImageStore::get`]
    /// says what is wrong with them.
    pub fn list(&self) -> Result<Vec<Image>, ImageError> {
        let mut images = Vec::new();
        for record in self.whole_refs()? {
            match self.image(record) {
                Ok(image) => images.push(image),
                // Deleted between the two looks.
                Err(ImageError::NotFound(_)) => {}
                Err(e @ ImageError::Format { .. }) => {
                    tracing::warn!(error = &e as &dyn std::error::Error, "damaged image");
                }
                Err(e) => return Err(e),
            }
        }
        Ok(images)
    }

    /// Points `target` at the content that `source` names now. `target` must not be a digest form.
    pub fn tag(&self, source: &str, target: &str) -> Result<Image, ImageError> {
        let target = name_to_point(target)?;
        if target.digest.is_some() {
            return Err(ReferenceError {
                input: target.to_string(),
                reason: "has a digest, which cannot be pointed elsewhere; allowed: name:tag".into(),
            }
            .into());
        }
        let _lock = StoreLock::take(&self.root)?;
        let image = self.get(source)?;
        self.image(self.write_ref(&target, &image.digest, image.tags)?)
    }

    /// Removes the reference; the content goes too when no other reference and no digest in
    /// `in_use` needs it.
    ///
    /// The digest form removes every name of that repository which points at the digest. `in_use`
    /// is asked with the store locked: it must not call the store.
    pub fn delete(&self, name: &str, in_use: &dyn Fn(&str) -> bool) -> Result<(), ImageError> {
        let reference: Reference = name.parse()?;
        let lock = StoreLock::take(&self.root)?;
        let records = match reference.digest {
            Some(_) => self.refs_at_digest(&reference)?,
            None => match self.read_ref(&reference) {
                // Where a damaged record pointed nobody knows: collect() finds the content.
                Err(ImageError::Format { .. }) => return self.remove_ref(&reference.to_string()),
                read => read?.into_iter().collect(),
            },
        };
        if records.is_empty() {
            return Err(ImageError::NotFound(reference.to_string()));
        }
        let mut digests = BTreeSet::new();
        for record in records {
            self.remove_ref(&record.name)?;
            digests.insert(record.digest);
        }
        let doomed = self.unlink_unneeded(digests, in_use)?;
        drop(lock);
        self.discard(doomed)
    }

    /// Removes content that neither a name nor `in_use` needs, and answers its digests.
    ///
    /// Such content stays when a name is deleted or moves while an instance uses it. `in_use` is
    /// asked with the store locked: it must not call the store.
    pub fn collect(&self, in_use: &dyn Fn(&str) -> bool) -> Result<Vec<String>, ImageError> {
        let lock = StoreLock::take(&self.root)?;
        let blobs = self.root.join(BLOBS);
        let failed = || ImageError::io(format!("look into {}", blobs.display()));
        let mut digests = BTreeSet::new();
        for entry in fs::read_dir(&blobs).map_err(failed())? {
            let name = entry.map_err(failed())?.file_name();
            let digest = name.to_string_lossy().replacen('-', ":", 1);
            // Whatever else lies there is not ours to remove.
            if digest.parse::<Digest>().is_ok() {
                digests.insert(digest);
            }
        }
        let doomed = self.unlink_unneeded(digests, in_use)?;
        drop(lock);
        let collected = doomed.iter().map(|d| d.digest.clone()).collect();
        self.discard(doomed)?;
        Ok(collected)
    }

    /// Reads the rootfs of this digest again and compares it with the checksum taken when it was
    /// built. [`ImageStore::get`] compares its size only.
    ///
    /// # Errors
    /// `Digest` when a byte has changed since: delete the image, then import it again.
    pub fn verify(&self, digest: &str) -> Result<(), ImageError> {
        let image = self.by_digest(digest)?;
        let parsed: Digest = image.digest.parse().map_err(|reason| ReferenceError {
            input: digest.to_owned(),
            reason,
        })?;
        let Some(blob) = self.read_blob(&parsed)? else {
            return Err(ImageError::NotFound(digest.to_owned()));
        };
        let (found, _) = File::open(&image.rootfs)
            .and_then(|file| HashReader::new(file).finish())
            .map_err(ImageError::io(format!("read {}", image.rootfs.display())))?;
        if found.to_string() == blob.rootfs_digest {
            return Ok(());
        }
        Err(ImageError::Digest {
            what: image.rootfs.display().to_string(),
            expected: blob.rootfs_digest,
            found: found.to_string(),
        })
    }

    /// Durably. The store is locked.
    fn remove_ref(&self, name: &str) -> Result<(), ImageError> {
        let path = self.ref_path(name);
        fs::remove_file(&path).map_err(ImageError::io(format!("remove {}", path.display())))?;
        sync_folder(&self.root.join(REFS))
    }

    /// Moves content nobody needs out of sight. The store is locked.
    fn unlink_unneeded(
        &self,
        digests: BTreeSet<String>,
        in_use: &dyn Fn(&str) -> bool,
    ) -> Result<Vec<Doomed>, ImageError> {
        let named: BTreeSet<String> = self.refs()?.into_iter().map(|r| r.digest).collect();
        let mut doomed = Vec::new();
        for digest in digests {
            if named.contains(&digest) || in_use(&digest) {
                continue;
            }
            let Ok(parsed) = digest.parse::<Digest>() else {
                continue;
            };
            let stage = Stage::create_locked(&self.root)?;
            let path = self.blob_path(&parsed);
            match fs::rename(&path, stage.path().join("blob")) {
                Ok(()) => doomed.push(Doomed { digest, stage }),
                Err(e) if e.kind() == io::ErrorKind::NotFound => stage.remove()?,
                Err(e) => return Err(ImageError::io(format!("remove {}", path.display()))(e)),
            }
        }
        sync_folder(&self.root.join(BLOBS))?;
        Ok(doomed)
    }

    fn discard(&self, doomed: Vec<Doomed>) -> Result<(), ImageError> {
        doomed.into_iter().try_for_each(|d| d.stage.remove())
    }

    fn blob_path(&self, digest: &Digest) -> PathBuf {
        self.root
            .join(BLOBS)
            .join(format!("sha256-{}", digest.hex()))
    }

    fn ref_path(&self, name: &str) -> PathBuf {
        self.root.join(REFS).join(record::ref_file_name(name))
    }

    /// The record of content that is here and whole.
    ///
    /// # Errors
    /// `Format` when its files disagree: somebody changed the store by hand.
    fn read_blob(&self, digest: &Digest) -> Result<Option<BlobRecord>, ImageError> {
        let folder = self.blob_path(digest);
        let path = folder.join(RECORD);
        let Some(record) = record::read::<BlobRecord>(&path)? else {
            return Ok(None);
        };
        let damaged = |reason: String| {
            let reason = format!("{reason}; import the image again to replace it");
            Err(ImageError::format(&path, reason))
        };
        if record.digest != digest.to_string() {
            return damaged(format!("the record is of {}", record.digest));
        }
        let rootfs = folder.join(ROOTFS);
        match fs::metadata(&rootfs) {
            Ok(meta) if meta.len() == record.size_bytes => Ok(Some(record)),
            Ok(meta) => damaged(format!(
                "{ROOTFS} has {} bytes, the record says {}",
                meta.len(),
                record.size_bytes
            )),
            Err(e) if e.kind() == io::ErrorKind::NotFound => damaged(format!("{ROOTFS} is gone")),
            Err(e) => Err(ImageError::io(format!("inspect {}", rootfs.display()))(e)),
        }
    }

    fn image(&self, reference: RefRecord) -> Result<Image, ImageError> {
        let path = self.ref_path(&reference.name);
        let digest: Digest = reference
            .digest
            .parse()
            .map_err(|reason: String| ImageError::format(&path, reason))?;
        let Some(blob) = self.read_blob(&digest)? else {
            return Err(ImageError::NotFound(reference.name));
        };
        Ok(Image {
            name: reference.name,
            digest: reference.digest,
            created_at: reference.created_at,
            platform: blob.platform,
            size_bytes: blob.size_bytes,
            config: blob.config,
            rootfs: self.blob_path(&digest).join(ROOTFS),
            rootfs_digest: blob.rootfs_digest,
            tags: reference.tags,
        })
    }

    fn read_ref(&self, reference: &Reference) -> Result<Option<RefRecord>, ImageError> {
        record::read(&self.ref_path(&reference.to_string()))
    }

    /// All names, sorted. An error when one cannot be read: what it needs is unknown then.
    fn refs(&self) -> Result<Vec<RefRecord>, ImageError> {
        self.read_refs()?.into_iter().collect()
    }

    /// All names that can be read, sorted; the others are logged.
    fn whole_refs(&self) -> Result<Vec<RefRecord>, ImageError> {
        let mut records = Vec::new();
        for record in self.read_refs()? {
            match record {
                Err(e @ ImageError::Format { .. }) => {
                    tracing::warn!(error = &e as &dyn std::error::Error, "damaged image name");
                }
                record => records.push(record?),
            }
        }
        Ok(records)
    }

    fn read_refs(&self) -> Result<Vec<Result<RefRecord, ImageError>>, ImageError> {
        let folder = self.root.join(REFS);
        let failed = || ImageError::io(format!("look into {}", folder.display()));
        let mut records = Vec::new();
        for entry in fs::read_dir(&folder).map_err(failed())? {
            let name = entry.map_err(failed())?.file_name();
            if name.to_str().is_some_and(record::is_ref_file_name) {
                // Gone meanwhile is fine.
                records.extend(record::read::<RefRecord>(&folder.join(name)).transpose());
            }
        }
        records.sort_by(|a, b| match (a, b) {
            (Ok(a), Ok(b)) => a.name.cmp(&b.name),
            (a, b) => a.is_ok().cmp(&b.is_ok()),
        });
        Ok(records)
    }

    /// Names of the reference's repository that point at the reference's digest, sorted.
    fn refs_at_digest(&self, reference: &Reference) -> Result<Vec<RefRecord>, ImageError> {
        let mut records = self.whole_refs()?;
        records.retain(|record| {
            Some(&record.digest) == reference.digest.as_ref()
                && record
                    .name
                    .parse::<Reference>()
                    .is_ok_and(|named| named.name() == reference.name())
        });
        Ok(records)
    }

    /// Points a name at content that is here. The store is locked.
    fn write_ref(
        &self,
        reference: &Reference,
        digest: &str,
        tags: BTreeMap<String, String>,
    ) -> Result<RefRecord, ImageError> {
        let before = self.read_ref(reference)?.filter(|old| old.digest == digest);
        let record = RefRecord {
            version: record::VERSION,
            name: reference.to_string(),
            digest: digest.to_owned(),
            created_at: match before {
                Some(old) => old.created_at,
                None => now()?,
            },
            tags,
        };
        record::write(&self.ref_path(&record.name), &record)?;
        Ok(record)
    }

    /// Removes what a crash between staging and renaming a record left.
    fn clean_refs(&self) -> Result<(), ImageError> {
        let _lock = StoreLock::take(&self.root)?;
        let folder = self.root.join(REFS);
        let clean = || -> io::Result<()> {
            for entry in fs::read_dir(&folder)? {
                let entry = entry?;
                if doze_host::files::is_stage_name(&entry.file_name()) {
                    fs::remove_file(entry.path())?;
                }
            }
            Ok(())
        };
        clean().map_err(ImageError::io(format!("clean {}", folder.display())))
    }
}

/// Content moved out of sight, waiting to be removed.
struct Doomed {
    digest: String,
    stage: Stage,
}

/// A reference that may become a name of this store.
fn name_to_point(name: &str) -> Result<Reference, ImageError> {
    let reference: Reference = name.parse()?;
    if reference.registry == "docker.io" && reference.repository == "library/sha256" {
        return Err(ReferenceError {
            input: name.to_owned(),
            reason: "would be confused with a digest; choose another name".into(),
        }
        .into());
    }
    Ok(reference)
}

fn now() -> Result<String, ImageError> {
    OffsetDateTime::now_utc()
        .replace_nanosecond(0)
        .map_err(|e| ImageError::io("read the clock")(io::Error::other(e)))?
        .format(&Rfc3339)
        .map_err(|e| ImageError::io("write the time")(io::Error::other(e)))
}

fn sync_folder(path: &Path) -> Result<(), ImageError> {
    doze_host::files::fsync_dir(path).map_err(ImageError::io(format!("fsync {}", path.display())))
}
