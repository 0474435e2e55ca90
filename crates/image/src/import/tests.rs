#![allow(clippy::unwrap_used, reason = "tests")]
use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
};

use serde_json::{Value, json};
use tempfile::TempDir;

use super::*;
use crate::testing::{LayerBuilder, Layout, archive, config, gzip, tar_folder};

struct Bed {
    temp: TempDir,
}

impl Bed {
    fn new() -> Self {
        Self {
            temp: TempDir::new().unwrap(),
        }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.temp.path().join(name)
    }

    fn plan(&self, path: &Path, name: &str, platform: Option<&str>) -> Result<Plan, ImageError> {
        let source = Source::open(path, self.temp.path(), 1 << 20)?;
        let plan = plan(&source, &name.parse().unwrap(), &Wanted::parse(platform)?)?;
        plan.verify(&source)?;
        Ok(plan)
    }

    /// Plans, verifies and unpacks; the tree's files.
    fn unpack(&self, path: &Path) -> Result<BTreeMap<String, String>, ImageError> {
        let source = Source::open(path, self.temp.path(), 1 << 20)?;
        let plan = plan(&source, &"demo".parse().unwrap(), &Wanted::parse(None)?)?;
        plan.verify(&source)?;
        let root = TempDir::new_in(self.temp.path()).unwrap();
        let unpacker = Unpacker::new(root.path(), path, layer::Limits::default())?;
        plan.unpack(&source, unpacker, &mut |_, _| {})?;
        let files = fs::read_dir(root.path()).unwrap().map(|entry| {
            let entry = entry.unwrap();
            let content = fs::read_to_string(entry.path()).unwrap();
            (entry.file_name().into_string().unwrap(), content)
        });
        Ok(files.collect())
    }
}

fn one_file(name: &str, content: &str) -> Vec<u8> {
    LayerBuilder::new().file(name, content.as_bytes()).build()
}

fn plain(layers: &[Vec<u8>]) -> Vec<(Vec<u8>, Vec<u8>)> {
    layers
        .iter()
        .map(|layer| (layer.clone(), layer.clone()))
        .collect()
}

fn expect(files: &[(&str, &str)]) -> BTreeMap<String, String> {
    files
        .iter()
        .map(|(name, content)| ((*name).to_owned(), (*content).to_owned()))
        .collect()
}

#[test]
fn layers_of_every_compression_unpack_in_order() {
    let bed = Bed::new();
    let layers = [one_file("a", "1"), one_file("b", "2"), one_file("a", "3")];
    let stored = vec![
        (gzip(&layers[0]), layers[0].clone()),
        (
            zstd::encode_all(&layers[1][..], 3).unwrap(),
            layers[1].clone(),
        ),
        (layers[2].clone(), layers[2].clone()),
    ];
    let layout = Layout::create(&bed.path("layout"));
    layout.index(&[layout.image("amd64", &stored)]);
    assert_eq!(
        bed.unpack(&bed.path("layout")).unwrap(),
        expect(&[("a", "3"), ("b", "2")])
    );
}

#[test]
fn a_layout_may_be_a_folder_a_tar_or_a_compressed_tar() {
    let bed = Bed::new();
    let digest = Layout::simple(&bed.path("layout"), &[one_file("a", "1")]);
    tar_folder(&bed.path("layout"), &bed.path("tar"));
    let tar = fs::read(bed.path("tar")).unwrap();
    fs::write(bed.path("gz"), gzip(&tar)).unwrap();
    fs::write(bed.path("zst"), zstd::encode_all(&tar[..], 1).unwrap()).unwrap();
    for form in ["layout", "tar", "gz", "zst"] {
        assert_eq!(
            bed.plan(&bed.path(form), "demo", None)
                .unwrap()
                .digest
                .to_string(),
            digest,
            "{form}"
        );
        assert_eq!(
            bed.unpack(&bed.path(form)).unwrap(),
            expect(&[("a", "1")]),
            "{form}"
        );
    }
    let bomb = gzip(&vec![0; 2 << 20]);
    fs::write(bed.path("bomb"), bomb).unwrap();
    let error = bed.plan(&bed.path("bomb"), "demo", None).unwrap_err();
    assert!(error.to_string().contains("more than the limit"), "{error}");
}

#[test]
fn the_platform_chooses_among_manifests() {
    let bed = Bed::new();
    let layout = Layout::create(&bed.path("layout"));
    let with = |descriptor: Value, architecture: &str, variant: Option<&str>| {
        let mut descriptor = descriptor;
        descriptor["platform"] = json!({"os": "linux", "architecture": architecture});
        if let Some(variant) = variant {
            descriptor["platform"]["variant"] = json!(variant);
        }
        descriptor
    };
    let image =
        |architecture, content| layout.image(architecture, &plain(&[one_file("a", content)]));
    let attestation = {
        let mut descriptor = with(image("unknown", "attestation"), "amd64", None);
        descriptor["annotations"] = json!({"vnd.docker.reference.type": "attestation-manifest"});
        descriptor
    };
    let manifests = json!([
        attestation,
        with(image("amd64", "v3"), "amd64", Some("v3")),
        with(image("amd64", "amd64"), "amd64", None),
        with(image("arm64", "arm64"), "arm64", Some("v8")),
    ]);
    let nested = json!({"schemaVersion": 2, "manifests": manifests}).to_string();
    let nested = layout.blob("application/vnd.oci.image.index.v1+json", nested.as_bytes());
    layout.index(&[nested]);

    let digest_of = |index: usize| manifests[index]["digest"].as_str().unwrap().to_owned();
    let chosen = |platform| {
        bed.plan(&bed.path("layout"), "demo", platform)
            .map(|p| p.digest.to_string())
    };
    assert_eq!(chosen(None).unwrap(), digest_of(2));
    assert_eq!(chosen(Some("linux/amd64")).unwrap(), digest_of(2));
    assert_eq!(chosen(Some("linux/arm64")).unwrap(), digest_of(3));
    // What the index promises the configuration must keep.
    assert!(matches!(
        chosen(Some("linux/amd64/v3")),
        Err(ImageError::Platform { .. })
    ));
    match chosen(Some("linux/riscv64")) {
        Err(ImageError::Platform { wanted, found }) => {
            assert_eq!(wanted, "linux/riscv64");
            assert_eq!(found, "linux/amd64, linux/amd64/v3, linux/arm64/v8");
        }
        other => panic!("{other:?}"),
    }
    for bad in ["linux", "", "linux/", "a/b/c/d", "linux/amd 64", "/amd64"] {
        assert!(
            matches!(chosen(Some(bad)), Err(ImageError::Platform { .. })),
            "{bad:?}"
        );
    }
}

#[test]
fn one_image_for_another_platform_is_refused() {
    let bed = Bed::new();
    let layout = Layout::create(&bed.path("layout"));
    layout.index(&[layout.image("arm64", &plain(&[one_file("a", "1")]))]);
    match bed.plan(&bed.path("layout"), "demo", None) {
        Err(ImageError::Platform { wanted, found }) => {
            assert_eq!(
                (wanted.as_str(), found.as_str()),
                ("linux/amd64", "linux/arm64")
            );
        }
        other => panic!("{other:?}"),
    }
    assert!(
        bed.plan(&bed.path("layout"), "demo", Some("linux/arm64"))
            .is_ok()
    );
}

#[test]
fn the_name_chooses_among_images() {
    let bed = Bed::new();
    let layout = Layout::create(&bed.path("layout"));
    let named = |content: &str, annotations: Value| {
        let mut descriptor = layout.image("amd64", &plain(&[one_file("a", content)]));
        descriptor["annotations"] = annotations;
        descriptor
    };
    let tagged = named("tag", json!({"org.opencontainers.image.ref.name": "v1"}));
    let whole = named(
        "whole",
        json!({
            "io.containerd.image.name": "docker.io/library/redis:7",
            "org.opencontainers.image.ref.name": "7",
        }),
    );
    layout.index(&[tagged.clone(), whole.clone()]);
    let chosen = |name: &str| {
        bed.plan(&bed.path("layout"), name, None)
            .map(|p| p.digest.to_string())
    };
    assert_eq!(chosen("anything:v1").unwrap(), tagged["digest"]);
    assert_eq!(chosen("redis:7").unwrap(), whole["digest"]);
    let by_digest = format!("x@{}", whole["digest"].as_str().unwrap());
    assert_eq!(chosen(&by_digest).unwrap(), whole["digest"]);
    let error = chosen("other:7").unwrap_err().to_string();
    assert!(error.contains("v1, docker.io/library/redis:7"), "{error}");
    // A single image is taken whatever it is called.
    layout.index(std::slice::from_ref(&whole));
    assert_eq!(chosen("other:7").unwrap(), whole["digest"]);
}

#[test]
fn every_blob_must_be_what_its_digest_says() {
    let bed = Bed::new();
    let path = bed.path("layout");
    Layout::simple(&path, &[one_file("a", "1")]);
    let blobs: Vec<PathBuf> = fs::read_dir(path.join("blobs/sha256"))
        .unwrap()
        .map(|b| b.unwrap().path())
        .collect();
    assert_eq!(blobs.len(), 3);
    for blob in blobs {
        let content = fs::read(&blob).unwrap();
        let mut changed = content.clone();
        changed[content.len() / 2] ^= 1;
        fs::write(&blob, &changed).unwrap();
        match bed.plan(&path, "demo", None) {
            Err(ImageError::Digest {
                expected, found, ..
            }) => {
                assert!(blob.ends_with(&expected["sha256:".len()..]));
                assert_eq!(found, Digest::of(&changed).to_string());
            }
            other => panic!("{other:?}"),
        }
        fs::write(&blob, &content[1..]).unwrap();
        assert!(matches!(
            bed.plan(&path, "demo", None),
            Err(ImageError::Format { .. })
        ));
        fs::remove_file(&blob).unwrap();
        let error = bed.plan(&path, "demo", None).unwrap_err();
        assert!(error.to_string().contains("missing"), "{error}");
        fs::write(&blob, &content).unwrap();
    }
    assert!(bed.plan(&path, "demo", None).is_ok());
}

#[test]
fn a_wrong_diff_id_is_found_while_unpacking() {
    let bed = Bed::new();
    let layout = Layout::create(&bed.path("layout"));
    let layers = vec![(gzip(&one_file("a", "1")), one_file("a", "2"))];
    layout.index(&[layout.image("amd64", &layers)]);
    match bed.unpack(&bed.path("layout")) {
        Err(ImageError::Digest { what, expected, .. }) => {
            assert!(what.contains("uncompressed"), "{what}");
            assert_eq!(expected, Digest::of(&layers[0].1).to_string());
        }
        other => panic!("{other:?}"),
    }
}

#[test]
fn malformed_layouts_are_errors() {
    let bed = Bed::new();
    let path = bed.path("layout");
    let layout = Layout::create(&path);
    let manifest = |value: Value| {
        layout.blob(
            "application/vnd.oci.image.manifest.v1+json",
            value.to_string().as_bytes(),
        )
    };
    let config_blob =
        |text: &str| layout.blob("application/vnd.oci.image.config.v1+json", text.as_bytes());
    let good_config = config("amd64", std::iter::empty());
    let layer = layout.blob(
        "application/vnd.oci.image.layer.v1.tar",
        &one_file("a", "1"),
    );
    let with = |config: Value, layers: Value| {
        manifest(json!({"schemaVersion": 2, "config": config, "layers": layers}))
    };
    let bad_digest =
        json!({"mediaType": "x", "digest": "sha256:../../../../etc/passwd", "size": 1});
    for (manifests, says) in [
        (vec![], "it has none"),
        (
            vec![manifest(
                json!({"schemaVersion": 1, "config": layer, "layers": []}),
            )],
            "schema version",
        ),
        (vec![manifest(json!([]))], "cannot be understood"),
        (
            vec![with(config_blob("{}"), json!([]))],
            "cannot be understood",
        ),
        (
            vec![with(config_blob(&good_config), json!([]))],
            "no layers",
        ),
        (
            vec![with(config_blob(&good_config), json!([layer]))],
            "1 layers, the configuration 0 diff_ids",
        ),
        (
            vec![with(config_blob(&good_config), json!([bad_digest]))],
            "diff_ids",
        ),
        (vec![with(layer.clone(), json!([layer]))], "it has none"),
        (
            vec![
                json!({"mediaType": "application/vnd.oci.image.manifest.v1+json", "digest": "sha256:..", "size": 1}),
            ],
            "malformed",
        ),
    ] {
        layout.index(&manifests);
        let error = bed.plan(&path, "demo", None).unwrap_err().to_string();
        assert!(error.contains(says), "{error:?} without {says:?}");
    }
    let huge = format!("{{\"manifests\": [], \"x\": \"{}\"}}", "x".repeat(5 << 20));
    fs::write(path.join("index.json"), huge).unwrap();
    let error = bed.plan(&path, "demo", None).unwrap_err().to_string();
    assert!(error.contains("4 MiB"), "{error}");
    // An index that contains itself cannot exist, but deep ones can.
    let mut inner = json!({"schemaVersion": 2, "manifests": []});
    for _ in 0..10 {
        let descriptor = layout.blob(
            "application/vnd.oci.image.index.v1+json",
            inner.to_string().as_bytes(),
        );
        inner = json!({"schemaVersion": 2, "manifests": [descriptor]});
    }
    fs::write(path.join("index.json"), inner.to_string()).unwrap();
    let error = bed.plan(&path, "demo", None).unwrap_err().to_string();
    assert!(error.contains("nested too deeply"), "{error}");
}

#[test]
fn other_files_are_told_apart_from_images() {
    let bed = Bed::new();
    fs::create_dir(bed.path("empty")).unwrap();
    fs::write(bed.path("text"), "hello").unwrap();
    fs::write(bed.path("zero"), "").unwrap();
    fs::write(bed.path("long"), "x".repeat(10_000)).unwrap();
    archive(&bed.path("tar"), &[("a", b"1")]);
    for name in ["empty", "text", "zero", "long", "tar"] {
        let error = bed.plan(&bed.path(name), "demo", None).unwrap_err();
        assert!(
            matches!(error, ImageError::Format { .. }),
            "{name}: {error:?}"
        );
    }
    assert!(matches!(
        bed.plan(&bed.path("absent"), "demo", None),
        Err(ImageError::Io { .. })
    ));
    assert!(matches!(
        bed.plan(Path::new("/dev/null"), "demo", None),
        Err(ImageError::Format { .. })
    ));
}

#[test]
fn a_cut_off_archive_is_an_error_wherever_it_is_cut() {
    let bed = Bed::new();
    Layout::simple(&bed.path("layout"), &[one_file("a", &"1".repeat(5000))]);
    tar_folder(&bed.path("layout"), &bed.path("tar"));
    let tar = fs::read(bed.path("tar")).unwrap();
    // The last 1024 bytes are the end marker.
    for end in (0..tar.len() - 1024).step_by(700) {
        fs::write(bed.path("cut"), &tar[..end]).unwrap();
        assert!(
            bed.plan(&bed.path("cut"), "demo", None).is_err(),
            "cut at {end} of {}",
            tar.len()
        );
    }
}

/// `docker save` before version 25.
fn docker_archive(
    path: &Path,
    layers: &[(&str, Vec<u8>)],
    plain: &[Vec<u8>],
    tags: Value,
) -> String {
    let config = config("amd64", plain.iter().map(Vec::as_slice));
    let config_name = format!("{}.json", Digest::of(config.as_bytes()).hex());
    let names: Vec<&str> = layers.iter().map(|(name, _)| *name).collect();
    let manifest = json!([{"Config": config_name, "RepoTags": tags, "Layers": names}]).to_string();
    let mut members = vec![
        (config_name.as_str(), config.as_bytes()),
        ("manifest.json", manifest.as_bytes()),
    ];
    members.extend(
        layers
            .iter()
            .map(|(name, content)| (*name, content.as_slice())),
    );
    archive(path, &members);
    config
}

#[test]
fn a_docker_archive_gets_a_digest_that_does_not_depend_on_its_packing() {
    let bed = Bed::new();
    let plain = vec![one_file("a", "1"), one_file("b", "2")];
    let tags = json!(["demo:latest"]);
    let layers = [
        ("x/layer.tar", plain[0].clone()),
        ("y/layer.tar", plain[1].clone()),
    ];
    let config = docker_archive(&bed.path("one"), &layers, &plain, tags);
    let layers = [("0.tar.gz", gzip(&plain[0])), ("1.tar.gz", gzip(&plain[1]))];
    docker_archive(&bed.path("two"), &layers, &plain, Value::Null);

    let manifest = format!(
        "{{\"schemaVersion\":2,\"mediaType\":\"application/vnd.oci.image.manifest.v1+json\",\
         \"config\":{{\"mediaType\":\"application/vnd.oci.image.config.v1+json\",\"digest\":\"{}\",\"size\":{}}},\
         \"layers\":[{{\"mediaType\":\"application/vnd.oci.image.layer.v1.tar\",\"digest\":\"{}\",\"size\":{}}},\
         {{\"mediaType\":\"application/vnd.oci.image.layer.v1.tar\",\"digest\":\"{}\",\"size\":{}}}]}}",
        Digest::of(config.as_bytes()),
        config.len(),
        Digest::of(&plain[0]),
        plain[0].len(),
        Digest::of(&plain[1]),
        plain[1].len(),
    );
    for form in ["one", "two"] {
        let plan = bed.plan(&bed.path(form), "anything", None).unwrap();
        assert_eq!(plan.digest, Digest::of(manifest.as_bytes()), "{form}");
        assert_eq!(plan.platform, "linux/amd64");
        assert_eq!(
            plan.config.entrypoint.as_deref(),
            Some(&["/bin/server".to_owned()][..])
        );
        assert_eq!(
            bed.unpack(&bed.path(form)).unwrap(),
            expect(&[("a", "1"), ("b", "2")]),
            "{form}"
        );
    }
}

#[test]
fn a_docker_archive_may_repeat_a_layer_as_a_link() {
    let bed = Bed::new();
    let layer = one_file("a", "1");
    let config = config("amd64", [layer.as_slice(), layer.as_slice()].into_iter());
    let manifest =
        json!([{"Config": "config.json", "Layers": ["x/layer.tar", "y/layer.tar"]}]).to_string();
    let tar = LayerBuilder::new()
        .file("config.json", config.as_bytes())
        .file("manifest.json", manifest.as_bytes())
        .file("x/layer.tar", &layer)
        .symlink("y/layer.tar", "../x/layer.tar");
    fs::write(bed.path("tar"), tar.build()).unwrap();
    assert_eq!(bed.unpack(&bed.path("tar")).unwrap(), expect(&[("a", "1")]));
}

#[test]
fn broken_docker_archives_are_errors() {
    let bed = Bed::new();
    let plain = vec![one_file("a", "1")];
    let other = one_file("a", "2");
    docker_archive(&bed.path("diff"), &[("l.tar", other)], &plain, Value::Null);
    assert!(matches!(
        bed.plan(&bed.path("diff"), "demo", None),
        Err(ImageError::Digest { .. })
    ));

    let config = config("amd64", plain.iter().map(Vec::as_slice));
    let wrong_name = format!("{}.json", Digest::of(b"other").hex());
    let entry =
        |config: &str, tag: &str| json!({"Config": config, "RepoTags": [tag], "Layers": ["l.tar"]});
    let write = |manifest: Value, config_name: &str| {
        let manifest = manifest.to_string();
        let members: &[(&str, &[u8])] = &[
            ("manifest.json", manifest.as_bytes()),
            (config_name, config.as_bytes()),
            ("l.tar", &plain[0]),
        ];
        archive(&bed.path("tar"), members);
        bed.plan(&bed.path("tar"), "demo", None)
    };
    assert!(write(json!([entry("c.json", "demo")]), "c.json").is_ok());
    assert!(matches!(
        write(json!([entry(&wrong_name, "demo")]), &wrong_name),
        Err(ImageError::Digest { .. })
    ));
    assert!(matches!(
        write(json!([entry("c.json", "demo")]), "d.json"),
        Err(ImageError::Format { .. })
    ));
    assert!(matches!(
        write(json!([entry("../c.json", "demo")]), "c.json"),
        Err(ImageError::Format { .. })
    ));
    assert!(matches!(
        write(json!([]), "c.json"),
        Err(ImageError::Format { .. })
    ));
    let two = json!([entry("c.json", "a:1"), entry("c.json", "b:2")]);
    let error = write(two, "c.json").unwrap_err().to_string();
    assert!(error.contains("a:1, b:2"), "{error}");
    let two = json!([
        entry("absent.json", "a:1"),
        entry("c.json", "docker.io/demo")
    ]);
    assert!(write(two, "c.json").is_ok());
}

#[test]
fn an_archive_with_both_forms_is_an_oci_layout() {
    let bed = Bed::new();
    let layer = one_file("a", "1");
    let digest = Layout::simple(&bed.path("layout"), std::slice::from_ref(&layer));
    let manifest = json!([{"Config": "absent", "Layers": ["absent"]}]).to_string();
    fs::write(bed.path("layout").join("manifest.json"), manifest).unwrap();
    tar_folder(&bed.path("layout"), &bed.path("tar"));
    assert_eq!(
        bed.plan(&bed.path("tar"), "demo", None)
            .unwrap()
            .digest
            .to_string(),
        digest
    );
}
