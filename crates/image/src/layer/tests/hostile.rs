//! Archives that nobody made by accident. Whatever they say, nothing outside the root may change.
use std::os::unix::fs::symlink;

use super::*;

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
