#![allow(clippy::unwrap_used, reason = "tests")]
use std::{
    fs,
    os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt, symlink},
    path::PathBuf,
};

use tempfile::TempDir;

use super::*;
use crate::testing::{LayerBuilder, Meta};

/// A folder with an empty root to unpack into, beside files that must stay as they are.
struct Bed {
    temp: TempDir,
}

impl Bed {
    fn new() -> Self {
        let temp = TempDir::new().unwrap();
        fs::create_dir(temp.path().join("root")).unwrap();
        fs::create_dir(temp.path().join("outside")).unwrap();
        fs::write(temp.path().join("outside/canary"), "untouched").unwrap();
        Self { temp }
    }

    fn root(&self) -> PathBuf {
        self.temp.path().join("root")
    }

    fn unpack(&self, layers: Vec<LayerBuilder>) -> Result<(), ImageError> {
        self.unpack_within(Limits::default(), layers)
    }

    fn unpack_within(&self, limits: Limits, layers: Vec<LayerBuilder>) -> Result<(), ImageError> {
        let mut unpacker = Unpacker::new(&self.root(), Path::new("image.tar"), limits)?;
        for (index, layer) in layers.into_iter().enumerate() {
            let archive = layer.build();
            unpacker.layer(&format!("l{index}"), archive.as_slice(), &mut |_| {})?;
        }
        unpacker.finish()
    }

    fn read(&self, path: &str) -> String {
        fs::read_to_string(self.root().join(path)).unwrap()
    }

    fn has(&self, path: &str) -> bool {
        fs::symlink_metadata(self.root().join(path)).is_ok()
    }

    fn meta(&self, path: &str) -> fs::Metadata {
        fs::symlink_metadata(self.root().join(path)).unwrap()
    }

    fn assert_outside_untouched(&self) {
        let outside = self.temp.path().join("outside");
        let names: Vec<_> = fs::read_dir(&outside)
            .unwrap()
            .map(|e| e.unwrap().file_name())
            .collect();
        assert_eq!(names, ["canary"]);
        let meta = fs::symlink_metadata(outside.join("canary")).unwrap();
        assert_eq!(
            (meta.nlink(), meta.permissions().mode() & 0o7777),
            (1, 0o644)
        );
        assert_eq!(
            fs::read_to_string(outside.join("canary")).unwrap(),
            "untouched"
        );
        let mut names: Vec<_> = fs::read_dir(self.temp.path())
            .unwrap()
            .map(|e| e.unwrap().file_name())
            .collect();
        names.sort();
        assert_eq!(names, ["outside", "root"]);
    }
}

fn layer() -> LayerBuilder {
    LayerBuilder::new()
}

fn meta(mode: u32) -> Meta {
    Meta {
        mode,
        ..Meta::default()
    }
}

#[test]
fn files_keep_content_owner_mode_and_time() {
    let bed = Bed::new();
    let special = Meta {
        mode: 0o4751,
        uid: 1234,
        gid: 70000,
        mtime: 946_684_800,
    };
    bed.unpack(vec![
        layer()
            .entry(
                b'5',
                "./",
                "",
                b"",
                Meta {
                    mode: 0o711,
                    ..special
                },
            )
            .entry(
                b'5',
                "d",
                "",
                b"",
                Meta {
                    mode: 0o1777,
                    ..special
                },
            )
            .entry(b'0', "d/setuid", "", b"program", special)
            .entry(b'2', "d/link", "/nowhere", b"", special),
    ])
    .unwrap();
    for (path, mode) in [
        ("", 0o711),
        ("d", 0o1777),
        ("d/setuid", 0o4751),
        ("d/link", 0o777),
    ] {
        let meta = bed.meta(path);
        assert_eq!(meta.mode() & 0o7777, mode, "{path}");
        assert_eq!((meta.uid(), meta.gid()), (1234, 70000), "{path}");
        assert_eq!(meta.mtime(), 946_684_800, "{path}");
    }
    assert_eq!(bed.read("d/setuid"), "program");
    assert_eq!(
        fs::read_link(bed.root().join("d/link")).unwrap(),
        Path::new("/nowhere")
    );
}

#[test]
fn devices_and_fifos() {
    let bed = Bed::new();
    bed.unpack(vec![
        layer()
            .device(b'3', "null", (1, 3))
            .device(b'4', "disk", (8, 17))
            .entry(b'6', "pipe", "", b"", meta(0o620)),
    ])
    .unwrap();
    assert!(bed.meta("null").file_type().is_char_device());
    assert_eq!(bed.meta("null").rdev(), rustix::fs::makedev(1, 3));
    assert!(bed.meta("disk").file_type().is_block_device());
    assert_eq!(bed.meta("disk").rdev(), rustix::fs::makedev(8, 17));
    assert!(bed.meta("pipe").file_type().is_fifo());
    assert_eq!(bed.meta("pipe").mode() & 0o7777, 0o620);
}

#[test]
fn extended_attributes() {
    let bed = Bed::new();
    let capability: &[u8] = b"\x01\0\0\x02\x0a\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0";
    let get = |path: &str, name: &str| {
        let mut value = [0; 64];
        let path = bed.root().join(path);
        rustix::fs::lgetxattr(&path, name, &mut value).map(|n| value[..n].to_vec())
    };
    bed.unpack(vec![
        layer()
            .pax(&[("SCHILY.xattr.security.capability", capability)])
            .entry(b'0', "ping", "", b"x", meta(0o755))
            .pax(&[
                ("SCHILY.xattr.user.a", b"old"),
                ("SCHILY.xattr.user.b", b"b"),
            ])
            .folder("d")
            .pax(&[
                ("SCHILY.xattr.trusted.t", b"1"),
                ("SCHILY.xattr.com.apple.x", b"1"),
            ])
            .symlink("l", "ping"),
        layer().pax(&[("SCHILY.xattr.user.a", b"new")]).folder("d"),
    ])
    .unwrap();
    assert_eq!(get("ping", "security.capability").unwrap(), capability);
    assert_eq!(get("d", "user.a").unwrap(), b"new");
    assert_eq!(get("d", "user.b"), Err(Errno::NODATA));
    assert_eq!(get("l", "trusted.t").unwrap(), b"1");
}

#[test]
fn missing_parents_get_fixed_metadata() {
    let bed = Bed::new();
    bed.unpack(vec![layer().file("a/b/c", b"x")]).unwrap();
    for path in ["", "a", "a/b"] {
        let meta = bed.meta(path);
        assert_eq!(
            (meta.mode() & 0o7777, meta.uid(), meta.mtime()),
            (0o755, 0, 0),
            "{path:?}"
        );
    }
}

#[test]
fn a_leading_slash_and_dots_mean_the_root() {
    let bed = Bed::new();
    bed.unpack(vec![
        layer()
            .file("/etc/a", b"1")
            .file("./etc/./b", b"2")
            .file("//etc//c", b"3"),
    ])
    .unwrap();
    assert_eq!(
        (bed.read("etc/a"), bed.read("etc/b"), bed.read("etc/c")),
        ("1".into(), "2".into(), "3".into())
    );
}

#[test]
fn folder_times_survive_later_changes_inside() {
    let bed = Bed::new();
    let at = |mtime| Meta {
        mode: 0o755,
        mtime,
        ..Meta::default()
    };
    bed.unpack(vec![
        layer().entry(b'5', "d", "", b"", at(1000)).file("d/a", b""),
        layer().file("d/b", b"").entry(b'5', "e", "", b"", at(2000)),
        layer().file("e/.wh.x", b"").file("d/.wh.a", b""),
    ])
    .unwrap();
    assert_eq!((bed.meta("d").mtime(), bed.meta("e").mtime()), (1000, 2000));
}

#[test]
fn a_link_in_a_folders_place_does_not_inherit_its_time() {
    let bed = Bed::new();
    let at = |mtime| Meta {
        mode: 0o755,
        mtime,
        ..Meta::default()
    };
    bed.unpack(vec![
        layer().entry(b'5', "a/b", "", b"", at(1000)),
        layer()
            .entry(b'5', "z/b", "", b"", at(2000))
            .symlink("a", "z"),
    ])
    .unwrap();
    assert_eq!(bed.meta("z/b").mtime(), 2000);
}

#[test]
fn whiteouts_remove_what_lower_layers_brought() {
    let bed = Bed::new();
    bed.unpack(vec![
        layer()
            .file("a", b"")
            .file("d/x", b"")
            .file("d/y/z", b"")
            .symlink("l", "d")
            .file("keep", b""),
        layer()
            .file(".wh.a", b"")
            .file(".wh.d", b"")
            .file(".wh.l", b"")
            .file(".wh.absent", b"")
            .file("no/.wh.x", b""),
    ])
    .unwrap();
    for gone in ["a", "d", "l", ".wh.a", ".wh.d", "no"] {
        assert!(!bed.has(gone), "{gone}");
    }
    assert!(bed.has("keep"));
}

#[test]
fn whiteouts_leave_their_own_layer_alone_in_any_order() {
    for opaque in [false, true] {
        let whiteout = |l: LayerBuilder| match opaque {
            true => l.file("d/.wh..wh..opq", b""),
            false => l.file(".wh.d", b""),
        };
        for before in [false, true] {
            let bed = Bed::new();
            let lower = layer()
                .file("d/old", b"")
                .file("d/sub/old", b"")
                .file("d/both", b"old");
            let mut upper = layer();
            if before {
                upper = whiteout(upper);
            }
            upper = upper
                .folder("d")
                .file("d/sub/new", b"")
                .file("d/both", b"new");
            if !before {
                upper = whiteout(upper);
            }
            bed.unpack(vec![lower, upper]).unwrap();
            let case = format!("opaque {opaque}, whiteout first {before}");
            assert!(!bed.has("d/old"), "{case}");
            assert!(!bed.has("d/sub/old"), "{case}");
            assert!(bed.has("d/sub/new"), "{case}");
            assert_eq!(bed.read("d/both"), "new", "{case}");
            assert!(!bed.has("d/.wh..wh..opq"), "{case}");
        }
    }
}

#[test]
fn a_whiteout_spares_a_link_to_what_it_hides() {
    let bed = Bed::new();
    bed.unpack(vec![
        layer().file("a", b"text"),
        layer().hard_link("b", "a").file(".wh.a", b""),
    ])
    .unwrap();
    assert!(!bed.has("a"));
    assert_eq!(bed.read("b"), "text");
}

#[test]
fn an_opaque_root_hides_everything_below() {
    let bed = Bed::new();
    bed.unpack(vec![
        layer().file("a", b"").file("d/b", b""),
        layer().file(".wh..wh..opq", b"").file("c", b""),
    ])
    .unwrap();
    assert!(!bed.has("a") && !bed.has("d") && bed.has("c"));
}

#[test]
fn bookkeeping_of_union_file_systems_is_left_out() {
    let bed = Bed::new();
    bed.unpack(vec![
        layer()
            .file(".wh..wh.aufs", b"")
            .folder(".wh..wh.plnk")
            .file(".wh..wh.plnk/1.2", b""),
    ])
    .unwrap();
    assert!(!bed.has(".wh..wh.aufs"));
}

#[test]
fn a_whiteout_goes_through_links_of_the_image_only() {
    let bed = Bed::new();
    let outside = bed.temp.path().join("outside");
    bed.unpack(vec![
        layer()
            .file("usr/bin/a", b"")
            .symlink("bin", "usr/bin")
            .symlink("out", outside.to_str().unwrap()),
        layer()
            .file("bin/.wh.a", b"")
            .file("out/.wh.canary", b"")
            .file("out/.wh..wh..opq", b""),
    ])
    .unwrap();
    assert!(!bed.has("usr/bin/a"));
    assert!(bed.has("bin"));
    bed.assert_outside_untouched();
}

#[test]
fn hard_links_within_and_across_layers() {
    let bed = Bed::new();
    bed.unpack(vec![
        layer()
            .file("d/a", b"text")
            .hard_link("b", "d/a")
            .symlink("s", "d/a")
            .hard_link("s2", "./s"),
        layer()
            .hard_link("/e/c", "/d/a")
            .symlink("link", "d")
            .hard_link("f", "link/a"),
    ])
    .unwrap();
    let inode = bed.meta("d/a").ino();
    for path in ["b", "e/c", "f"] {
        assert_eq!(bed.meta(path).ino(), inode, "{path}");
    }
    // A link to a symlink is the symlink, not what it leads to.
    assert_eq!(bed.meta("s2").ino(), bed.meta("s").ino());
    assert!(bed.meta("s2").is_symlink());
}

#[test]
fn replacing_one_name_leaves_the_other_names_of_a_file() {
    let bed = Bed::new();
    bed.unpack(vec![
        layer().file("a", b"old").hard_link("b", "a"),
        layer().file("a", b"new"),
    ])
    .unwrap();
    assert_eq!((bed.read("a"), bed.read("b")), ("new".into(), "old".into()));
}

#[test]
fn kinds_replace_each_other_across_layers() {
    let bed = Bed::new();
    bed.unpack(vec![
        layer()
            .file("file-to-folder", b"")
            .file("folder-to-file/x/y", b"")
            .file("folder-to-link/x", b"")
            .file("real/x", b"")
            .symlink("link-to-folder", "real")
            .symlink("link-to-file", "real/x")
            .entry(b'5', "folder", "", b"", meta(0o700))
            .file("folder/kept", b""),
        layer()
            .file("file-to-folder/x", b"no parent entry")
            .file("folder-to-file", b"file"),
    ])
    .unwrap_err();
    // A file is no folder: the entry for the folder must come first.
    let bed = Bed::new();
    bed.unpack(vec![
        layer()
            .file("file-to-folder", b"")
            .file("folder-to-file/x/y", b"")
            .file("folder-to-link/x", b"")
            .file("real/x", b"real")
            .symlink("link-to-folder", "real")
            .symlink("link-to-file", "real/x")
            .entry(b'5', "folder", "", b"", meta(0o700))
            .file("folder/kept", b""),
        layer()
            .folder("file-to-folder")
            .file("file-to-folder/x", b"")
            .file("folder-to-file", b"file")
            .symlink("folder-to-link", "real")
            .folder("link-to-folder")
            .file("link-to-folder/new", b"")
            .file("link-to-file", b"file")
            .entry(b'5', "folder", "", b"", meta(0o751)),
    ])
    .unwrap();
    assert!(bed.has("file-to-folder/x"));
    assert_eq!(bed.read("folder-to-file"), "file");
    assert!(bed.meta("folder-to-link").is_symlink());
    assert!(bed.meta("link-to-folder").is_dir());
    assert!(!bed.has("link-to-folder/x") && !bed.has("real/new"));
    assert!(bed.meta("link-to-file").is_file());
    assert_eq!(bed.read("real/x"), "real");
    assert_eq!(bed.meta("folder").mode() & 0o7777, 0o751);
    assert!(bed.has("folder/kept"));
}

#[test]
fn entries_go_through_links_as_after_chroot() {
    let bed = Bed::new();
    bed.unpack(vec![
        layer()
            .folder("usr/lib")
            .symlink("lib", "/usr/lib")
            .symlink("lib2", "../../../../usr/./lib/")
            .symlink("run", "/not/yet/there"),
        layer()
            .file("lib/a", b"")
            .file("lib2/b", b"")
            .file("run/c", b""),
    ])
    .unwrap();
    assert!(bed.has("usr/lib/a") && bed.has("usr/lib/b") && bed.has("not/yet/there/c"));
    assert!(bed.meta("lib").is_symlink());
}

fn refused(layers: Vec<LayerBuilder>) -> String {
    let bed = Bed::new();
    let error = bed.unpack(layers).unwrap_err();
    bed.assert_outside_untouched();
    match error {
        ImageError::Unsafe {
            layer,
            entry,
            reason,
        } => format!("{layer} {entry} {reason}"),
        other => panic!("{other:?}"),
    }
}

#[test]
fn hostile_entries_are_refused_by_name_and_reason() {
    let deep = "d/".repeat(300) + "x";
    let long_name = "n".repeat(256);
    let nobody = Meta {
        uid: u64::from(u32::MAX),
        ..Meta::default()
    };
    let huge_id = Meta {
        gid: 1 << 33,
        ..Meta::default()
    };
    for (layer, says) in [
        (layer().file("../outside/canary", b"x"), ".."),
        (layer().file("a/../../outside/x", b"x"), ".."),
        (layer().file("a/..", b"x"), ".."),
        (layer().folder(".."), ".."),
        (layer().symlink("../l", "x"), ".."),
        (layer().file(".wh...", b""), "whiteout of no name"),
        (layer().file(".wh..", b""), "whiteout of no name"),
        (layer().file(".wh.", b""), "whiteout of no name"),
        (layer().file("../.wh.canary", b""), ".."),
        (
            layer().file("a", b"").hard_link("b", "../outside/canary"),
            "..",
        ),
        (layer().hard_link("b", "/absent"), "does not exist"),
        (layer().hard_link("b", "absent/x"), "does not exist"),
        (layer().folder("d").hard_link("b", "d"), "folder"),
        (layer().file("a", b"").hard_link("a", "a"), "itself"),
        (layer().file("a", b"").hard_link("b", "."), "root"),
        (layer().file("/", b"x"), "root"),
        (
            layer().symlink("a", "b").symlink("b", "a").file("a/x", b""),
            "symbolic links",
        ),
        (layer().file("a", b"").file("a/b", b""), "not a folder"),
        (layer().file(&deep, b""), "256 components"),
        (layer().file(&long_name, b""), "255 bytes"),
        (
            layer().pax(&[("path", b"a\0b")]).file("x", b""),
            "zero byte",
        ),
        (layer().symlink("a", ""), "nothing"),
        (layer().entry(b'0', "a", "", b"", nobody), "uid"),
        (layer().entry(b'0', "a", "", b"", huge_id), "gid"),
        (layer().entry(b'?', "a", "", b"", Meta::default()), "type"),
    ] {
        let message = refused(vec![layer]);
        assert!(
            message.starts_with("l0 ") && message.contains(says),
            "{message:?} without {says:?}"
        );
    }
}

#[test]
fn links_to_the_outside_lead_inside() {
    let bed = Bed::new();
    let outside = bed.temp.path().join("outside");
    let outside = outside.to_str().unwrap();
    bed.unpack(vec![
        layer().symlink("abs", outside).symlink("rel", "../outside"),
        layer()
            .file("abs/canary", b"x")
            .file("rel/canary", b"y")
            .folder("abs")
            .file("abs/z", b""),
    ])
    .unwrap();
    bed.assert_outside_untouched();
    assert!(bed.has(&outside[1..]));
    assert_eq!(bed.read("outside/canary"), "y");
}

#[test]
fn a_hard_link_cannot_reach_through_a_link_to_the_outside() {
    let bed = Bed::new();
    let outside = bed.temp.path().join("outside");
    let error = bed
        .unpack(vec![
            layer()
                .symlink("out", outside.to_str().unwrap())
                .hard_link("b", "out/canary"),
        ])
        .unwrap_err();
    assert!(matches!(error, ImageError::Unsafe { .. }), "{error:?}");
    bed.assert_outside_untouched();
}

#[test]
fn folders_cannot_nest_without_end_through_links() {
    let folders = "d/".repeat(200);
    let layers = vec![
        layer()
            .folder(&folders)
            .symlink("s", &folders)
            .folder(&format!("s/{folders}")),
    ];
    assert!(refused(layers).contains("256 folders deep"));
}

#[test]
fn limits_hold_over_all_layers() {
    let limits = Limits {
        bytes: 10_000,
        entries: 3,
    };
    let two = || layer().file("a", b"").file("b", b"");
    let bed = Bed::new();
    bed.unpack_within(limits, vec![two()]).unwrap();
    let error = Bed::new()
        .unpack_within(limits, vec![two(), two()])
        .unwrap_err();
    assert!(error.to_string().contains("more than 3 entries"), "{error}");
    let big = || layer().file("a", &[1; 4000]);
    let error = Bed::new()
        .unpack_within(limits, vec![big(), big()])
        .unwrap_err();
    assert!(
        matches!(&error, ImageError::Unsafe { reason, .. } if reason.contains("limit")),
        "{error}"
    );
}

#[test]
fn damage_is_a_format_error_that_names_source_and_layer() {
    let bed = Bed::new();
    let archive = layer().file("a", &[1; 4000]).build();
    let mut unpacker =
        Unpacker::new(&bed.root(), Path::new("image.tar"), Limits::default()).unwrap();
    let error = unpacker
        .layer("l", &archive[..2000], &mut |_| {})
        .unwrap_err();
    let text = error.to_string();
    assert!(matches!(error, ImageError::Format { .. }));
    assert!(
        text.contains("image.tar") && text.contains("layer l") && text.contains("\"a\""),
        "{text}"
    );
}

#[test]
fn progress_ends_with_the_whole_size() {
    let bed = Bed::new();
    let archive = layer().file("a", &vec![1; 9 << 20]).build();
    let mut seen = Vec::new();
    let mut unpacker =
        Unpacker::new(&bed.root(), Path::new("image.tar"), Limits::default()).unwrap();
    unpacker
        .layer("l", archive.as_slice(), &mut |bytes| seen.push(bytes))
        .unwrap();
    assert!(seen.len() > 3 && seen.is_sorted());
    assert_eq!(seen.last(), Some(&(archive.len() as u64)));
}

mod random {
    use proptest::prelude::*;

    use super::*;

    /// Few names, so that entries meet each other; many ways out.
    fn component() -> impl Strategy<Value = String> {
        prop_oneof![
            6 => prop::sample::select(vec!["a", "b", "c", "d"]).prop_map(str::to_owned),
            1 => prop::sample::select(vec!["..", ".", "", "outside", "canary", "root"]).prop_map(str::to_owned),
            1 => prop::sample::select(vec![".wh.a", ".wh.b", ".wh..", ".wh...", ".wh..wh..opq", ".wh.canary"])
                .prop_map(str::to_owned),
        ]
    }

    fn path() -> impl Strategy<Value = String> {
        (any::<bool>(), prop::collection::vec(component(), 1..4)).prop_map(|(absolute, parts)| {
            format!("{}{}", if absolute { "/" } else { "" }, parts.join("/"))
        })
    }

    /// `OUT` becomes the folder with the canary.
    fn target() -> impl Strategy<Value = String> {
        prop_oneof![
            3 => path(),
            1 => Just("OUT".to_owned()),
            1 => Just("OUT/canary".to_owned()),
            1 => Just("../../outside".to_owned()),
        ]
    }

    fn entry() -> impl Strategy<Value = (u8, String, String)> {
        let flag = prop::sample::select(vec![
            b'0', b'0', b'1', b'1', b'2', b'2', b'2', b'5', b'6', b'3',
        ]);
        (flag, path(), target())
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(256))]

        #[test]
        fn archives_never_touch_anything_outside(
            layers in prop::collection::vec(prop::collection::vec(entry(), 1..14), 1..4)
        ) {
            let bed = Bed::new();
            let out = bed.temp.path().join("outside").to_str().unwrap().to_owned();
            let mut unpacker =
                Unpacker::new(&bed.root(), Path::new("image.tar"), Limits::default()).unwrap();
            'layers: for entries in layers {
                // One refused entry ends an import, so each gets its own archive here: as many as
                // possible shall be applied.
                for (flag, name, target) in entries {
                    let target = target.replace("OUT", &out);
                    let content: &[u8] = if flag == b'0' { b"hostile" } else { b"" };
                    let meta = Meta { mode: 0o777, uid: 4242, ..Meta::default() };
                    let link = if matches!(flag, b'1' | b'2') { target.as_str() } else { "" };
                    let archive = layer().entry(flag, &name, link, content, meta).build();
                    match unpacker.layer("l", archive.as_slice(), &mut |_| {}) {
                        Ok(()) | Err(ImageError::Unsafe { .. }) => {}
                        // Nothing the archive says may look like a fault of this host.
                        Err(other) => {
                            prop_assert!(false, "{} {name:?} -> {link:?}: {other:?}", flag as char);
                            break 'layers;
                        }
                    }
                }
            }
            let finished = unpacker.finish();
            prop_assert!(finished.is_ok(), "{:?}", finished);
            bed.assert_outside_untouched();
        }
    }
}

#[test]
fn the_canary_test_itself_can_fail() {
    let bed = Bed::new();
    symlink(bed.temp.path().join("outside"), bed.root().join("out")).unwrap();
    fs::write(bed.root().join("out/canary"), "changed").unwrap();
    assert!(std::panic::catch_unwind(|| bed.assert_outside_untouched()).is_err());
}
