#![allow(clippy::unwrap_used, reason = "tests")]
use proptest::prelude::*;

use super::*;
use crate::testing::{LayerBuilder, Meta};

impl Skip for &[u8] {}

fn entries(archive: &[u8]) -> Result<Vec<(Entry, Vec<u8>)>, TarError> {
    let mut tar = TarStream::new(archive);
    let mut entries = Vec::new();
    while let Some(entry) = tar.next_entry()? {
        let mut content = Vec::new();
        let mut buffer = [0; 100];
        loop {
            let n = tar.read_content(&mut buffer)?;
            if n == 0 {
                break;
            }
            content.extend_from_slice(&buffer[..n]);
        }
        entries.push((entry, content));
    }
    Ok(entries)
}

fn only(archive: &[u8]) -> Entry {
    let mut entries = entries(archive).unwrap();
    assert_eq!(entries.len(), 1);
    entries.remove(0).0
}

#[test]
fn headers_and_contents_come_in_order() {
    let meta = Meta {
        mode: 0o4755,
        uid: 1000,
        gid: 2000,
        mtime: 77,
    };
    let archive = LayerBuilder::new()
        .file("a", b"content of a")
        .folder("d/")
        .entry(b'0', "d/b", "", &[7; 513], meta)
        .symlink("l", "../x")
        .hard_link("h", "a")
        .device(b'3', "null", (1, 3))
        .device(b'4', "disk", (8, 1))
        .entry(b'6', "pipe", "", b"", meta)
        .build();
    let entries = entries(&archive).unwrap();
    let kinds: Vec<_> = entries.iter().map(|(e, _)| e.kind.clone()).collect();
    assert_eq!(
        kinds,
        [
            Kind::File,
            Kind::Directory,
            Kind::File,
            Kind::Symlink(b"../x".to_vec()),
            Kind::HardLink(b"a".to_vec()),
            Kind::CharDevice { major: 1, minor: 3 },
            Kind::BlockDevice { major: 8, minor: 1 },
            Kind::Fifo,
        ]
    );
    assert_eq!(entries[0].1, b"content of a");
    assert_eq!(entries[2].1, [7; 513]);
    let b = &entries[2].0;
    assert_eq!(
        (b.mode, b.uid, b.gid, b.mtime.seconds),
        (0o4755, 1000, 2000, 77)
    );
}

#[test]
fn unread_content_is_skipped() {
    let archive = LayerBuilder::new()
        .file("a", &[1; 2000])
        .file("b", b"x")
        .build();
    let mut tar = TarStream::new(archive.as_slice());
    assert_eq!(tar.next_entry().unwrap().unwrap().path, b"a");
    tar.read_content(&mut [0; 10]).unwrap();
    assert_eq!(tar.next_entry().unwrap().unwrap().path, b"b");
    assert!(tar.next_entry().unwrap().is_none());
    assert!(tar.next_entry().unwrap().is_none());
}

#[test]
fn long_names_of_both_kinds() {
    let name = "n/".repeat(60) + "file";
    let link = "l/".repeat(70) + "file";
    let gnu = LayerBuilder::new().symlink(&name, &link).build();
    let pax = LayerBuilder::new()
        .pax(&[("path", name.as_bytes()), ("linkpath", link.as_bytes())])
        .symlink("short", "short")
        .build();
    for archive in [gnu, pax] {
        let entry = only(&archive);
        assert_eq!(entry.path, name.as_bytes());
        assert_eq!(entry.kind, Kind::Symlink(link.clone().into_bytes()));
    }
}

#[test]
fn pax_records_override_the_header() {
    let capability = b"\x01\0\0\x02\x0a\0\0\0=\n\0\n\0\0\0\0\0\0\0\0";
    let archive = LayerBuilder::new()
        .pax(&[
            ("uid", b"70000"),
            ("gid", b"70001"),
            ("mtime", b"1234.5"),
            ("size", b"3"),
            ("SCHILY.xattr.security.capability", capability),
            ("SCHILY.xattr.user.empty", b""),
        ])
        .file("a", b"abc")
        .file("b", b"")
        .build();
    let entries = entries(&archive).unwrap();
    let a = &entries[0].0;
    assert_eq!(
        (a.uid, a.gid, entries[0].1.as_slice()),
        (70000, 70001, &b"abc"[..])
    );
    assert_eq!(
        a.mtime,
        Time {
            seconds: 1234,
            nanoseconds: 500_000_000
        }
    );
    assert_eq!(a.xattrs[&b"security.capability"[..]], capability);
    assert_eq!(a.xattrs[&b"user.empty"[..]], b"");
    // The records were for one entry only.
    assert_eq!((entries[1].0.uid, entries[1].0.xattrs.len()), (0, 0));
}

#[test]
fn global_records_hold_until_overridden() {
    let mut archive = LayerBuilder::new().pax(&[("uid", b"5")]).build();
    // Turn the local header into a global one and repair its checksum.
    archive.truncate(1024);
    let mut header = tar::Header::from_byte_slice(&archive[..512]).clone();
    header.set_entry_type(tar::EntryType::XGlobalHeader);
    header.set_cksum();
    archive[..512].copy_from_slice(header.as_bytes());
    archive.extend(
        LayerBuilder::new()
            .file("a", b"")
            .pax(&[("uid", b"6")])
            .file("b", b"")
            .build(),
    );
    let uids: Vec<_> = entries(&archive)
        .unwrap()
        .iter()
        .map(|(e, _)| e.uid)
        .collect();
    assert_eq!(uids, [5, 6]);
}

#[test]
fn folders_of_old_archives_have_only_a_slash() {
    let archive = LayerBuilder::new().file("d/", b"").file("f", b"").build();
    let kinds: Vec<_> = entries(&archive)
        .unwrap()
        .into_iter()
        .map(|(e, _)| e.kind)
        .collect();
    assert_eq!(kinds, [Kind::Directory, Kind::File]);
}

#[test]
fn blank_numbers_are_zero() {
    let mut archive = LayerBuilder::new().device(b'3', "null", (0, 0)).build();
    let mut header = tar::Header::from_byte_slice(&archive[..512]).clone();
    let gnu = header.as_gnu_mut().unwrap();
    (gnu.uid, gnu.gid, gnu.mode) = ([0; 8], [b' '; 8], [0; 8]);
    (gnu.size, gnu.mtime) = ([0; 12], [0; 12]);
    (gnu.dev_major, gnu.dev_minor) = ([0; 8], [0; 8]);
    header.set_cksum();
    archive[..512].copy_from_slice(header.as_bytes());
    let entry = only(&archive);
    assert_eq!((entry.uid, entry.gid, entry.mode, entry.size), (0, 0, 0, 0));
    assert_eq!(entry.kind, Kind::CharDevice { major: 0, minor: 0 });
}

#[test]
fn times_before_1970_are_1970() {
    let archive = LayerBuilder::new()
        .pax(&[("mtime", b"-5.25")])
        .file("a", b"")
        .build();
    assert_eq!(only(&archive).mtime, Time::default());
}

#[test]
fn cut_off_archives_are_errors() {
    let archive = LayerBuilder::new()
        .pax(&[("uid", b"1")])
        .file("a", &[1; 600])
        .build();
    let whole = archive.len() - 1024;
    for end in [100, 512, 600, 1024, 1100, 1536, 1600, whole - 1] {
        assert!(entries(&archive[..end]).is_err(), "cut at {end}");
    }
    // The end marker itself may be missing, in part or in whole.
    assert_eq!(entries(&archive[..whole]).unwrap().len(), 1);
    assert_eq!(entries(&archive[..whole + 512]).unwrap().len(), 1);
}

#[test]
fn damaged_and_hostile_headers_are_errors() {
    let mut archive = LayerBuilder::new().file("a", b"x").build();
    archive[0] = b'b';
    assert!(matches!(entries(&archive), Err(TarError::Malformed(_))));

    let huge = vec![b'n'; (MAX_EXTENSION + 1) as usize];
    let archive = LayerBuilder::new().raw(b'L', b"x", b"", &huge, Meta::default(), (0, 0));
    assert!(matches!(
        entries(&archive.build()),
        Err(TarError::Malformed(_))
    ));

    for records in [
        &b"5 a=b"[..],
        b"9999999999 a=b\n",
        b"7 ab\n",
        b"x a=b\n",
        b"-6 a=b\n",
        b"3 a",
        b"0 \n",
    ] {
        let archive = LayerBuilder::new()
            .raw(b'x', b"p", b"", records, Meta::default(), (0, 0))
            .file("a", b"");
        assert!(
            entries(&archive.build()).is_err(),
            "{:?}",
            String::from_utf8_lossy(records)
        );
    }
    for (key, value) in [
        ("uid", "x"),
        ("size", "-1"),
        ("mtime", "soon"),
        ("mtime", "1.x"),
    ] {
        let archive = LayerBuilder::new()
            .pax(&[(key, value.as_bytes())])
            .file("a", b"");
        assert!(entries(&archive.build()).is_err(), "{key}={value}");
    }
    let sparse = LayerBuilder::new()
        .pax(&[("GNU.sparse.major", b"1")])
        .file("a", b"");
    assert!(entries(&sparse.build()).is_err());
    let sparse = LayerBuilder::new().entry(b'S', "a", "", b"", Meta::default());
    assert!(entries(&sparse.build()).is_err());
    // An extension that nothing follows.
    assert!(entries(&LayerBuilder::new().pax(&[("uid", b"1")]).build()).is_err());
    // A size that reaches beyond all numbers.
    let archive = LayerBuilder::new()
        .pax(&[("size", b"18446744073709551615")])
        .file("a", b"");
    assert!(entries(&archive.build()).is_err());
}

proptest! {
    #[test]
    fn arbitrary_bytes_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..2048)) {
        let _ = entries(&bytes);
    }

    #[test]
    fn arbitrary_damage_never_panics(
        at in 0usize..4096,
        value in any::<u8>(),
        repair in any::<bool>(),
    ) {
        let mut archive = LayerBuilder::new()
            .pax(&[("uid", b"1"), ("SCHILY.xattr.user.a", b"b\nc")])
            .file("a", &[1; 600])
            .symlink(&"x".repeat(150), "y")
            .build();
        let at = at % archive.len();
        archive[at] = value;
        if repair {
            let block = at / 512 * 512;
            let mut header = tar::Header::from_byte_slice(&archive[block..block + 512]).clone();
            header.set_cksum();
            archive[block..block + 512].copy_from_slice(header.as_bytes());
        }
        let _ = entries(&archive);
    }

    #[test]
    fn pax_records_round_trip(
        records in proptest::collection::btree_map(
            "[a-z.]{1,12}",
            proptest::collection::vec(any::<u8>(), 0..200),
            0..6,
        )
    ) {
        let list: Vec<_> = records.iter().map(|(k, v)| (k.as_str(), v.as_slice())).collect();
        let archive = LayerBuilder::new().pax(&list).build();
        let size = tar::Header::from_byte_slice(&archive[..512]).entry_size().unwrap();
        let parsed = parse_records(&archive[512..512 + size as usize]).unwrap();
        let expected: Records =
            records.into_iter().map(|(k, v)| (k.into_bytes(), v)).collect();
        prop_assert_eq!(parsed, expected);
    }
}
