#![allow(clippy::unwrap_used, reason = "tests")]
use std::{fs, os::unix::fs::MetadataExt, path::Path, process::Command};

use tempfile::TempDir;

use super::*;
use crate::{
    ImportEvent,
    testing::{LayerBuilder, Layout},
};

fn store(folder: &Path) -> ImageStore {
    ImageStore::open(&folder.join("images")).unwrap()
}

fn import(store: &ImageStore, name: &str, path: &Path) -> Result<Image, ImageError> {
    store.import(name, path, None, BTreeMap::new(), &mut |_| {})
}

/// A layout whose one layer has `content` in `/bin/server`.
fn layout(path: &Path, content: &str) -> String {
    let layer = LayerBuilder::new()
        .folder("bin")
        .file("bin/server", content.as_bytes());
    Layout::simple(path, &[layer.build()])
}

/// Nothing of an import may stay in the stage folder.
fn staged(store: &ImageStore) -> usize {
    fs::read_dir(store.root.join("stage")).unwrap().count()
}

#[test]
fn an_oci_layout_becomes_an_image() {
    let temp = TempDir::new().unwrap();
    let store = store(temp.path());
    let digest = layout(&temp.path().join("layout"), "hello");
    let mut events = Vec::new();
    let tags = BTreeMap::from([("team".to_owned(), "a".to_owned())]);
    let image = store
        .import(
            "demo",
            &temp.path().join("layout"),
            None,
            tags.clone(),
            &mut |e| events.push(e),
        )
        .unwrap();

    assert_eq!(image.name, "docker.io/library/demo:latest");
    assert_eq!(image.digest, digest);
    assert_eq!(image.platform, "linux/amd64");
    assert_eq!(image.tags, tags);
    assert_eq!(
        image.config.entrypoint.as_deref(),
        Some(&["/bin/server".to_owned()][..])
    );
    assert_eq!(image.config.cmd, None);
    assert_eq!(image.config.env, ["PATH=/bin", "A=b=c"]);
    assert_eq!(image.config.user.as_deref(), Some("redis"));
    let meta = fs::metadata(&image.rootfs).unwrap();
    assert_eq!(meta.mode() & 0o7777, 0o444);
    assert_eq!(meta.len(), image.size_bytes);
    assert!(matches!(events.first(), Some(ImportEvent::Reading { .. })));
    assert!(events.contains(&ImportEvent::Building));
    assert_eq!(
        events.last(),
        Some(&ImportEvent::Done {
            digest: digest.clone()
        })
    );
    assert_eq!(staged(&store), 0);

    let out = temp.path().join("out");
    let status = Command::new("fsck.erofs")
        .arg(format!("--extract={}", out.display()))
        .arg(&image.rootfs)
        .status()
        .unwrap();
    assert!(status.success());
    assert_eq!(fs::read_to_string(out.join("bin/server")).unwrap(), "hello");

    let reopened = ImageStore::open(&store.root).unwrap();
    for name in [
        "demo".to_owned(),
        "demo:latest".to_owned(),
        "library/demo".to_owned(),
        "docker.io/demo".to_owned(),
        "index.docker.io/library/demo:latest".to_owned(),
    ] {
        assert_eq!(reopened.get(&name).unwrap(), image, "{name}");
    }
    for name in [format!("demo@{digest}"), format!("demo:other@{digest}")] {
        let found = reopened.get(&name).unwrap();
        assert_eq!(found.name, format!("docker.io/library/demo@{digest}"));
        assert_eq!(
            (found.digest, found.rootfs),
            (image.digest.clone(), image.rootfs.clone())
        );
    }
    assert_eq!(reopened.list().unwrap(), [image.clone()]);

    reopened.delete("demo", &|_| false).unwrap();
    assert!(matches!(reopened.get("demo"), Err(ImageError::NotFound(_))));
    assert!(matches!(
        reopened.delete("demo", &|_| false),
        Err(ImageError::NotFound(_))
    ));
    assert!(!image.rootfs.exists());
    assert_eq!(staged(&store), 0);
}
