#![allow(clippy::unwrap_used, reason = "tests")]
use std::{
    fs,
    os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt},
    path::PathBuf,
};

use tempfile::TempDir;

use super::*;
use crate::testing::{LayerBuilder, Meta};

mod hostile;

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

/// The umask belongs to the process, so the test above is run again in another one.
#[test]
fn the_umask_does_not_show() {
    let output = std::process::Command::new("sh")
        .args([
            "-c",
            "umask 077; exec \"$0\" --exact layer::tests::missing_parents_get_fixed_metadata",
        ])
        .arg(std::env::current_exe().unwrap())
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(
        output.status.success() && text.contains("1 passed"),
        "{text}"
    );
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
