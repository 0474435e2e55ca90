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
    assert_eq!(reopened.list().unwrap(), std::slice::from_ref(&image));

    reopened.delete("demo", &|_| false).unwrap();
    assert!(matches!(reopened.get("demo"), Err(ImageError::NotFound(_))));
    assert!(matches!(
        reopened.delete("demo", &|_| false),
        Err(ImageError::NotFound(_))
    ));
    assert!(!image.rootfs.exists());
    assert_eq!(staged(&store), 0);
}

#[test]
fn the_same_image_gives_the_same_bytes() {
    let temp = TempDir::new().unwrap();
    let layers = || {
        let big = vec![5; 100_000];
        let one = LayerBuilder::new()
            .file("z", b"1")
            .file("a/b", &big)
            .symlink("l", "a");
        let two = LayerBuilder::new()
            .hard_link("h", "z")
            .file("a/.wh.x", b"")
            .device(b'3', "null", (1, 3));
        vec![one.build(), two.build()]
    };
    let mut files = Vec::new();
    for name in ["one", "two"] {
        let path = temp.path().join(name).join("layout");
        Layout::simple(&path, &layers());
        let image = import(&store(&temp.path().join(name)), "demo", &path).unwrap();
        files.push(fs::read(image.rootfs).unwrap());
    }
    assert!(files[0] == files[1]);
}

#[test]
fn importing_again_verifies_but_does_not_build() {
    let temp = TempDir::new().unwrap();
    let store = store(temp.path());
    let path = temp.path().join("layout");
    layout(&path, "hello");
    let first = import(&store, "demo", &path).unwrap();
    let before = fs::metadata(&first.rootfs).unwrap();
    let mut events = Vec::new();
    let again = store
        .import("demo:2", &path, None, BTreeMap::new(), &mut |e| {
            events.push(e)
        })
        .unwrap();
    assert_eq!(again.rootfs, first.rootfs);
    assert_eq!(fs::metadata(&again.rootfs).unwrap().ino(), before.ino());
    assert!(!events.contains(&ImportEvent::Building));
    // The same name and content keep the day they met; tags are replaced.
    let tags = BTreeMap::from([("a".to_owned(), "b".to_owned())]);
    let tagged = store
        .import("demo", &path, None, tags.clone(), &mut |_| {})
        .unwrap();
    assert_eq!((tagged.created_at, tagged.tags), (first.created_at, tags));

    let blob = largest_blob(&path);
    let content = fs::read(&blob).unwrap();
    let mut broken = content.clone();
    broken[0] ^= 1;
    fs::write(&blob, broken).unwrap();
    assert!(matches!(
        import(&store, "demo", &path),
        Err(ImageError::Digest { .. })
    ));
}

/// The layer's blob in a layout of one layer.
fn largest_blob(layout: &Path) -> PathBuf {
    let blobs = fs::read_dir(layout.join("blobs/sha256")).unwrap();
    blobs
        .map(|b| b.unwrap().path())
        .max_by_key(|b| fs::metadata(b).unwrap().len())
        .unwrap()
}

#[test]
fn a_name_moves_to_new_content_and_digests_still_find_the_old() {
    let temp = TempDir::new().unwrap();
    let store = store(temp.path());
    let (old, new) = (temp.path().join("old"), temp.path().join("new"));
    let old_digest = layout(&old, "old");
    let new_digest = layout(&new, "new");
    let old_image = import(&store, "demo", &old).unwrap();
    import(&store, "demo", &new).unwrap();
    assert_eq!(store.get("demo").unwrap().digest, new_digest);
    // No name of the repository points there, but instances made before still run on it.
    let by_name = format!("demo@{old_digest}");
    assert!(
        matches!(store.get(&by_name), Err(ImageError::NotFound(name)) if name.ends_with(&by_name))
    );
    let found = store.by_digest(&old_digest).unwrap();
    assert_eq!(found.rootfs, old_image.rootfs);
    assert_eq!(found.name, format!("docker.io/library/demo@{old_digest}"));
    assert_eq!(store.get(&old_digest).unwrap(), found);

    assert!(
        store
            .collect(&|digest| digest == old_digest)
            .unwrap()
            .is_empty()
    );
    assert_eq!(store.collect(&|_| false).unwrap(), [old_digest.as_str()]);
    assert!(matches!(
        store.by_digest(&old_digest),
        Err(ImageError::NotFound(_))
    ));
    assert!(!old_image.rootfs.exists());
    assert_eq!(store.get("demo").unwrap().digest, new_digest);
}

#[test]
fn deleting_keeps_what_another_name_or_an_instance_needs() {
    let temp = TempDir::new().unwrap();
    let store = store(temp.path());
    let path = temp.path().join("layout");
    let digest = layout(&path, "hello");
    let image = import(&store, "demo", &path).unwrap();
    let other = store.tag("demo", "example.com/other:v1").unwrap();
    assert_eq!(
        (other.name.as_str(), &other.digest),
        ("example.com/other:v1", &digest)
    );
    let names = |store: &ImageStore| -> Vec<String> {
        store.list().unwrap().into_iter().map(|i| i.name).collect()
    };
    assert_eq!(
        names(&store),
        ["docker.io/library/demo:latest", "example.com/other:v1"]
    );

    store.delete("demo", &|_| false).unwrap();
    assert!(image.rootfs.exists());
    store
        .delete("example.com/other:v1", &|in_use| in_use == digest)
        .unwrap();
    assert!(image.rootfs.exists());
    assert!(names(&store).is_empty());
    assert_eq!(store.collect(&|_| false).unwrap(), [digest]);
    assert!(!image.rootfs.exists());
}

#[test]
fn deleting_by_digest_removes_all_names_of_that_repository() {
    let temp = TempDir::new().unwrap();
    let store = store(temp.path());
    let path = temp.path().join("layout");
    let digest = layout(&path, "hello");
    import(&store, "demo:1", &path).unwrap();
    import(&store, "demo:2", &path).unwrap();
    import(&store, &format!("demo@{digest}"), &path).unwrap();
    import(&store, "other:1", &path).unwrap();
    assert_eq!(store.list().unwrap().len(), 4);
    let wrong = format!("demo@sha256:{}", "0".repeat(64));
    assert!(matches!(
        store.delete(&wrong, &|_| false),
        Err(ImageError::NotFound(_))
    ));
    store.delete(&format!("demo@{digest}"), &|_| false).unwrap();
    let left = store.list().unwrap();
    assert_eq!(left.len(), 1);
    assert_eq!(left[0].name, "docker.io/library/other:1");
    assert!(left[0].rootfs.exists());
}

#[test]
fn names_with_a_digest_must_be_true() {
    let temp = TempDir::new().unwrap();
    let store = store(temp.path());
    let path = temp.path().join("layout");
    let digest = layout(&path, "hello");
    let wrong = format!("demo@sha256:{}", "0".repeat(64));
    assert!(matches!(
        import(&store, &wrong, &path),
        Err(ImageError::Digest { .. })
    ));
    let image = import(&store, &format!("demo:1@{digest}"), &path).unwrap();
    assert_eq!(image.name, format!("docker.io/library/demo@{digest}"));
    assert!(store.tag(&image.name, &wrong).is_err());
    assert!(matches!(
        store.tag("absent", "x"),
        Err(ImageError::NotFound(_))
    ));
    assert!(matches!(
        import(&store, "sha256:1", &path),
        Err(ImageError::Reference(_))
    ));
    assert!(matches!(
        import(&store, "Demo", &path),
        Err(ImageError::Reference(_))
    ));
    assert_eq!(staged(&store), 0);
}

#[test]
fn very_long_names_work() {
    let temp = TempDir::new().unwrap();
    let store = store(temp.path());
    let path = temp.path().join("layout");
    layout(&path, "hello");
    let name = format!(
        "{}.example.com/{}:{}",
        "r".repeat(200),
        "p".repeat(255),
        "t".repeat(128)
    );
    let image = import(&store, &name, &path).unwrap();
    assert_eq!(image.name, name);
    assert_eq!(store.get(&name).unwrap(), image);
    assert_eq!(store.list().unwrap(), [image]);
    store.delete(&name, &|_| false).unwrap();
    assert!(store.list().unwrap().is_empty());
}

#[test]
fn a_failed_import_leaves_nothing() {
    let temp = TempDir::new().unwrap();
    let path = temp.path().join("layout");
    let bad = LayerBuilder::new().file("ok", b"").file("../escape", b"x");
    Layout::simple(&path, &[bad.build()]);
    let open = store(temp.path());
    assert!(matches!(
        import(&open, "demo", &path),
        Err(ImageError::Unsafe { .. })
    ));
    layout(&path, "hello");
    let broken = open.clone().with_mkfs("/nonexistent/mkfs.erofs".into());
    match import(&broken, "demo", &path) {
        Err(ImageError::Missing { what, mend }) => {
            assert!(what.contains("/nonexistent/mkfs.erofs"), "{what}");
            assert!(mend.contains("apt-get install erofs-utils"), "{mend}");
        }
        other => panic!("{other:?}"),
    }
    match import(&open.clone().with_mkfs("/bin/false".into()), "demo", &path) {
        Err(ImageError::Io { context, .. }) => {
            assert!(context.contains("exit status: 1"), "{context}")
        }
        other => panic!("{other:?}"),
    }
    let tiny = open.clone().with_limits(Limits {
        bytes: 512,
        entries: 10,
    });
    assert!(matches!(
        import(&tiny, "demo", &path),
        Err(ImageError::Unsafe { .. })
    ));
    for folder in ["stage", BLOBS, REFS] {
        assert_eq!(
            fs::read_dir(open.root.join(folder)).unwrap().count(),
            0,
            "{folder}"
        );
    }
    import(&open, "demo", &path).unwrap();
}

#[test]
fn damaged_content_is_told_and_mended_by_another_import() {
    let temp = TempDir::new().unwrap();
    let store = store(temp.path());
    let (path, other) = (temp.path().join("layout"), temp.path().join("other"));
    layout(&path, "hello");
    layout(&other, "other");
    let image = import(&store, "demo", &path).unwrap();
    import(&store, "other", &other).unwrap();
    fs::remove_file(&image.rootfs).unwrap();
    fs::write(&image.rootfs, b"short").unwrap();
    let error = store.get("demo").unwrap_err();
    assert!(
        error.to_string().contains("import the image again"),
        "{error}"
    );
    assert_eq!(
        store.list().unwrap().len(),
        1,
        "one damaged image hides no other"
    );
    assert_eq!(import(&store, "demo", &path).unwrap(), image);
    assert_eq!(store.get("demo").unwrap(), image);
    assert_eq!(staged(&store), 0);

    let record = image.rootfs.with_file_name(RECORD);
    fs::write(&record, "{}").unwrap();
    assert!(matches!(store.get("demo"), Err(ImageError::Format { .. })));
    store.delete("demo", &|_| false).unwrap();
    assert!(!record.exists());
}

#[test]
fn records_of_another_version_are_refused_by_name() {
    let temp = TempDir::new().unwrap();
    let store = store(temp.path());
    let path = temp.path().join("layout");
    layout(&path, "hello");
    import(&store, "demo", &path).unwrap();
    let file = store.ref_path("docker.io/library/demo:latest");
    let text = fs::read_to_string(&file)
        .unwrap()
        .replace("\"version\": 1", "\"version\": 7");
    fs::write(&file, text).unwrap();
    let error = store.get("demo").unwrap_err();
    assert!(error.to_string().contains("version 7"), "{error}");
    // One unreadable name hides no other, but nothing is collected while its needs are unknown.
    import(&store, "other", &path).unwrap();
    assert_eq!(store.list().unwrap().len(), 1);
    assert!(matches!(
        store.collect(&|_| false),
        Err(ImageError::Format { .. })
    ));
    store.delete("demo", &|_| false).unwrap();
    assert!(!file.exists());
    assert!(store.collect(&|_| false).unwrap().is_empty());
}

#[test]
fn a_changed_byte_of_the_rootfs_is_found() {
    let temp = TempDir::new().unwrap();
    let store = store(temp.path());
    let path = temp.path().join("layout");
    let digest = layout(&path, "hello");
    let image = import(&store, "demo", &path).unwrap();
    store.verify(&digest).unwrap();
    let mut content = fs::read(&image.rootfs).unwrap();
    content[2000] ^= 1;
    fs::remove_file(&image.rootfs).unwrap();
    fs::write(&image.rootfs, content).unwrap();
    assert!(matches!(
        store.verify(&digest),
        Err(ImageError::Digest { .. })
    ));
}

#[test]
fn concurrent_imports_of_one_image_agree() {
    let temp = TempDir::new().unwrap();
    let path = temp.path().join("layout");
    layout(&path, "hello");
    let root = temp.path().join("images");
    let images: Vec<Image> = std::thread::scope(|scope| {
        let imports: Vec<_> = (0..4)
            .map(|_| {
                scope.spawn(|| {
                    // Each opens the store itself, as another process would.
                    import(&ImageStore::open(&root).unwrap(), "demo", &path).unwrap()
                })
            })
            .collect();
        imports
            .into_iter()
            .map(|import| import.join().unwrap())
            .collect()
    });
    let store = ImageStore::open(&root).unwrap();
    for image in images {
        assert_eq!(store.get("demo").unwrap().rootfs, image.rootfs);
    }
    assert_eq!(fs::read_dir(root.join(BLOBS)).unwrap().count(), 1);
    assert_eq!(staged(&store), 0);
}

#[test]
fn opening_spares_an_import_at_work_and_removes_dead_ones() {
    let temp = TempDir::new().unwrap();
    let root = temp.path().join("images");
    let path = temp.path().join("layout");
    layout(&path, "hello");
    let store = ImageStore::open(&root).unwrap();
    fs::create_dir_all(root.join("stage/import-dead/tree/deep")).unwrap();
    fs::write(root.join("stage/import-dead/tree/deep/file"), "x").unwrap();
    fs::write(root.join(REFS).join(".x.json.1.1.stage"), "half").unwrap();
    let mut opened = false;
    store
        .import("demo", &path, None, BTreeMap::new(), &mut |event| {
            if event == ImportEvent::Building {
                let other = ImageStore::open(&root).unwrap();
                opened = staged(&other) == 1 && other.list().unwrap().is_empty();
            }
        })
        .unwrap();
    assert!(opened);
    assert_eq!(staged(&store), 0);
    assert_eq!(fs::read_dir(root.join(REFS)).unwrap().count(), 1);
}

/// The child of the next test: imports and stops at the named event until it is killed.
#[test]
fn import_until_killed() {
    let Ok(folder) = std::env::var("DOZE_TEST_KILLED_IMPORT") else {
        return;
    };
    let folder = Path::new(&folder);
    let stop_at = std::env::var("DOZE_TEST_STOP_AT").unwrap();
    let mut progress = |event: ImportEvent| {
        if format!("{event:?}").starts_with(&stop_at) {
            println!("stopped");
            // Ends with the parent's pipe at the latest.
            let _ = std::io::stdin().read_line(&mut String::new());
            std::process::abort();
        }
    };
    let store = ImageStore::open(&folder.join("images")).unwrap();
    store
        .import(
            "demo",
            &folder.join("layout"),
            None,
            BTreeMap::new(),
            &mut progress,
        )
        .unwrap();
}

#[test]
fn a_killed_import_leaves_nothing_behind() {
    use std::{
        io::{BufRead, BufReader},
        process::Stdio,
    };
    for stop_at in ["Reading", "Layer", "Building"] {
        let temp = TempDir::new().unwrap();
        layout(&temp.path().join("layout"), "hello");
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args([
                "--exact",
                "store::tests::import_until_killed",
                "--nocapture",
            ])
            .env("DOZE_TEST_KILLED_IMPORT", temp.path())
            .env("DOZE_TEST_STOP_AT", stop_at)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
        assert!(
            lines.any(|line| line.unwrap().contains("stopped")),
            "{stop_at}"
        );
        child.kill().unwrap();
        child.wait().unwrap();

        let root = temp.path().join("images");
        let left = fs::read_dir(root.join("stage")).unwrap().count();
        assert_eq!(left, usize::from(stop_at != "Reading"), "{stop_at}");
        let store = ImageStore::open(&root).unwrap();
        assert_eq!(staged(&store), 0, "{stop_at}");
        assert!(store.list().unwrap().is_empty(), "{stop_at}");
        assert_eq!(
            fs::read_dir(root.join(BLOBS)).unwrap().count(),
            0,
            "{stop_at}"
        );
        import(&store, "demo", &temp.path().join("layout")).unwrap();
    }
}

#[test]
fn the_store_is_private() {
    let temp = TempDir::new().unwrap();
    let store = store(temp.path());
    for folder in [
        store.root.clone(),
        store.root.join(BLOBS),
        store.root.join("stage"),
    ] {
        assert_eq!(fs::metadata(folder).unwrap().mode() & 0o7777, 0o700);
    }
}
