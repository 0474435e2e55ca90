#![allow(clippy::unwrap_used, clippy::expect_used, reason = "tests")]
use std::{
    fs::File,
    io::{self, Read},
    os::unix::fs::{FileExt, MetadataExt},
};

use proptest::prelude::*;
use twox_hash::XxHash64;

use super::*;

/// What a whole stream holds.
type Files = Vec<(String, Vec<u8>)>;
/// Kinds and payloads.
type Records = Vec<(u8, Vec<u8>)>;
/// Whether it is the fault that was expected.
type Expected<'a> = &'a dyn Fn(&StreamFault) -> bool;

fn tell(files: &Files) -> Vec<u8> {
    let mut writer = StreamWriter::new(Vec::new()).unwrap();
    for (name, bytes) in files {
        writer.bytes(name, bytes).unwrap();
    }
    writer.finish().unwrap()
}

fn take(stream: impl Read) -> Result<Files, StreamError> {
    let mut reader = StreamReader::new(stream)?;
    let mut files = Vec::new();
    while let Some(header) = reader.next_file()? {
        let content = reader.small(&header, 64 << 20)?;
        files.push((header.name, content));
    }
    Ok(files)
}

fn fault(stream: &[u8]) -> (u64, Option<String>, StreamFault) {
    match take(stream).expect_err("a broken stream") {
        StreamError::Broken { at, file, fault } => (at, file, fault),
        other => panic!("{other}"),
    }
}

fn noise(length: usize, seed: u64) -> Vec<u8> {
    let mut state = seed | 1;
    let mut byte = || {
        state = state
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1);
        (state >> 56) as u8
    };
    (0..length).map(|_| byte()).collect()
}

fn sample() -> Files {
    let mut mixed = vec![0; 3 * BLOCK + 100];
    mixed[BLOCK..BLOCK + 4000].copy_from_slice(&noise(4000, 7));
    mixed[3 * BLOCK + 99] = 1;
    vec![
        ("snapshot.json".to_owned(), b"{}".to_vec()),
        ("empty".to_owned(), Vec::new()),
        ("memory".to_owned(), mixed),
    ]
}

/// A record as it should be, whatever it says.
fn record(number: u64, kind: u8, payload: &[u8]) -> Vec<u8> {
    let mut bytes = vec![kind];
    bytes.extend_from_slice(&(payload.len() as u32).to_le_bytes());
    bytes.extend_from_slice(payload);
    let checksum = XxHash64::oneshot(number, &bytes);
    bytes.extend_from_slice(&checksum.to_le_bytes());
    bytes
}

/// A stream of these records; its last checksums are right, so that what they say is reached.
fn forged(records: &[(u8, Vec<u8>)]) -> Vec<u8> {
    let mut bytes = [&MAGIC[..], &VERSION.to_le_bytes()].concat();
    for (number, (kind, payload)) in records.iter().enumerate() {
        bytes.extend(record(number as u64, *kind, payload));
    }
    bytes
}

fn begin(name: &[u8], size: u64) -> (u8, Vec<u8>) {
    (FILE, [&size.to_le_bytes(), name].concat())
}

fn data(offset: u64, length: u32, codec: u8, bytes: &[u8]) -> (u8, Vec<u8>) {
    let payload = [
        &offset.to_le_bytes()[..],
        &length.to_le_bytes(),
        &[codec],
        bytes,
    ];
    (DATA, payload.concat())
}

#[test]
fn what_is_told_is_taken() {
    let files = sample();
    let stream = tell(&files);
    assert_eq!(take(&stream[..]).unwrap(), files);
    // Zeros cost nothing, noise little more than itself.
    assert!(stream.len() < 10_000, "{}", stream.len());
    let noisy = vec![("noise".to_owned(), noise(2 * BLOCK + 1, 3))];
    let stream = tell(&noisy);
    assert!(stream.len() < 2 * BLOCK + 300, "{}", stream.len());
    assert_eq!(take(&stream[..]).unwrap(), noisy);
    assert_eq!(take(&tell(&Vec::new())[..]).unwrap(), []);
}

#[test]
fn the_form_is_the_documented_one() {
    let stream = tell(&vec![("a".to_owned(), vec![5])]);
    let content = XxHash64::oneshot(0, &[0, 0, 0, 0, 0, 0, 0, 0, 5]);
    let mut expected = forged(&[
        begin(b"a", 1),
        data(0, 1, CODEC_RAW, &[5]),
        (
            FILE_END,
            [1_u64.to_le_bytes(), content.to_le_bytes()].concat(),
        ),
    ]);
    let all = XxHash64::oneshot(0, &expected).to_le_bytes();
    expected.extend(record(3, END, &[&1_u32.to_le_bytes()[..], &all].concat()));
    assert_eq!(stream, expected);
}

#[test]
fn holes_stay_holes() {
    let dir = tempfile::tempdir().unwrap();
    let (from, to) = (dir.path().join("from"), dir.path().join("to"));
    let size = 64 * BLOCK as u64 + 4096;
    let source = File::create_new(&from).unwrap();
    source.set_len(size).unwrap();
    source.write_all_at(&[7; 10_000], 33 << 20).unwrap();
    // A page of zeros that is none of a hole.
    source.write_all_at(&[0; 8192], 40 << 20).unwrap();
    source.write_all_at(b"end", size - 3).unwrap();
    let mut writer = StreamWriter::new(Vec::new()).unwrap();
    writer
        .file("memory", &File::open(&from).unwrap(), size)
        .unwrap();
    let stream = writer.finish().unwrap();
    assert!(stream.len() < 3000, "{}", stream.len());

    let mut reader = StreamReader::new(&stream[..]).unwrap();
    let header = reader.next_file().unwrap().unwrap();
    let target = File::create_new(&to).unwrap();
    target.set_len(header.size).unwrap();
    let mut offsets = Vec::new();
    while let Some(block) = reader.next_block().unwrap() {
        block.write_to(&target).unwrap();
        offsets.push(block.offset >> 20);
    }
    assert_eq!(offsets, [33, 64]);
    assert_eq!(reader.next_file().unwrap(), None);
    assert_eq!(reader.next_file().unwrap(), None, "the end stays the end");
    assert!(std::fs::read(&from).unwrap() == std::fs::read(&to).unwrap());
    assert!(target.metadata().unwrap().blocks() * 512 <= 32 << 10);
}

#[test]
fn a_cut_anywhere_is_found() {
    let stream = tell(&sample());
    for end in 0..stream.len() {
        let (at, _, fault) = fault(&stream[..end]);
        let expected = match end {
            0 => StreamFault::Magic,
            _ => StreamFault::Truncated,
        };
        assert_eq!((at, fault), (end as u64, expected));
    }
}

#[test]
fn what_follows_the_end_is_found() {
    let mut stream = tell(&sample());
    let end = stream.len() as u64;
    stream.push(0);
    assert_eq!(fault(&stream), (end, None, StreamFault::Trailing));
}

#[test]
fn every_flipped_bit_is_found() {
    let stream = tell(&sample());
    for at in 0..stream.len() {
        let mut bad = stream.clone();
        bad[at] ^= 1 << (at % 8);
        let error = take(&bad[..]).expect_err("a flipped bit");
        let StreamError::Broken { at: named, .. } = error else {
            panic!("{error}");
        };
        assert!(named <= stream.len() as u64);
    }
    let mut foreign = stream.clone();
    foreign[14] = 2;
    assert_eq!(fault(&foreign).2, StreamFault::Version { found: 2 });
    assert_eq!(fault(b"PK\x03\x04").2, StreamFault::Magic);
}

#[test]
fn a_flipped_bit_names_its_file_and_record() {
    let files = vec![("memory".to_owned(), noise(BLOCK, 5))];
    let mut stream = tell(&files);
    // Behind the header and FILE.
    let data_at = 16 + 5 + 8 + 6 + 8;
    stream[data_at + 500] ^= 1;
    let (at, file, fault) = fault(&stream);
    assert_eq!((at, file.as_deref()), (data_at as u64, Some("memory")));
    assert!(matches!(fault, StreamFault::Record { .. }), "{fault}");
    let error = take(&stream[..]).unwrap_err().to_string();
    assert!(
        error.starts_with("at byte 43, in memory: a record is damaged"),
        "{error}"
    );
}

/// Records with the right checksum each, in the wrong place.
#[test]
fn exchanged_repeated_and_lost_records_are_found() {
    let files = vec![("memory".to_owned(), noise(3 * BLOCK, 9))];
    let stream = tell(&files);
    let mut cuts = vec![16];
    while let Some(&at) = cuts.last()
        && at < stream.len()
    {
        let length = u32::from_le_bytes(stream[at + 1..at + 5].try_into().unwrap());
        cuts.push(at + RECORD_HEADER + length as usize + 8);
    }
    let record = |n: usize| &stream[cuts[n]..cuts[n + 1]];
    let with = |order: &[usize]| {
        let records: Vec<u8> = order.iter().flat_map(|n| record(*n).to_vec()).collect();
        [&stream[..16], &records].concat()
    };
    assert!(take(&with(&[0, 1, 2, 3, 4, 5])[..]).is_ok());
    for order in [
        &[0, 2, 1, 3, 4, 5][..],
        &[0, 1, 1, 2, 3, 4, 5],
        &[0, 1, 3, 4, 5],
    ] {
        let fault = fault(&with(order)).2;
        assert!(
            matches!(fault, StreamFault::Record { .. }),
            "{order:?}: {fault}"
        );
    }
    // The same with the numbers made right.
    let numbered = |order: &[usize]| {
        let records: Vec<_> = order
            .iter()
            .map(|n| {
                let bytes = record(*n);
                (bytes[0], bytes[RECORD_HEADER..bytes.len() - 8].to_vec())
            })
            .collect();
        fault(&forged(&records)).2
    };
    let exchanged = numbered(&[0, 2, 1, 3, 4, 5]);
    assert!(
        matches!(exchanged, StreamFault::Block { offset: 0, .. }),
        "{exchanged}"
    );
    let lost = numbered(&[0, 1, 3, 4, 5]);
    assert!(matches!(lost, StreamFault::Content(_)), "{lost}");
    // Two files exchanged: only the last checksum sees it.
    let two = tell(&vec![("a".into(), vec![1]), ("b".into(), vec![1])]);
    let swapped: Vec<u8> = {
        let half = (two.len() - 16 - 25) / 2;
        let (a, b) = (&two[16..16 + half], &two[16 + half..16 + 2 * half]);
        let mut records = Vec::new();
        for part in [b, a, &two[16 + 2 * half..]] {
            let mut at = 0;
            while at < part.len() {
                let length = u32::from_le_bytes(part[at + 1..at + 5].try_into().unwrap()) as usize;
                records.push((part[at], part[at + 5..at + 5 + length].to_vec()));
                at += 13 + length;
            }
        }
        forged(&records)
    };
    assert_eq!(
        fault(&swapped).2,
        StreamFault::All("its checksum is another")
    );
}

#[test]
fn forged_records_are_refused() {
    let order = |fault: &StreamFault| matches!(fault, StreamFault::Order(_));
    let is: Expected<'_> = &|fault| matches!(fault, StreamFault::Size { .. });
    let length: Expected<'_> = &|fault| matches!(fault, StreamFault::Length { .. });
    let block: Expected<'_> = &|fault| matches!(fault, StreamFault::Block { .. });
    let codec: Expected<'_> = &|fault| matches!(fault, StreamFault::Codec(_));
    let a = || begin(b"a", 10);
    let bomb = zstd::bulk::compress(&vec![0; 8 * BLOCK], 1).unwrap();
    let end = [0; 16].to_vec();
    let cases: Vec<(&str, Records, Expected<'_>)> = vec![
        ("a size beyond all", vec![begin(b"a", MAX_FILE + 1)], is),
        ("no size", vec![(FILE, vec![1, 2])], length),
        ("an unknown kind", vec![(9, vec![])], &order),
        ("data without a file", vec![data(0, 1, 0, &[1])], &order),
        (
            "an end without a file",
            vec![(FILE_END, end.clone())],
            &order,
        ),
        ("a file in a file", vec![a(), a()], &order),
        ("the end in a file", vec![a(), (END, vec![0; 12])], &order),
        (
            "the same file again",
            vec![begin(b"a", 0), (FILE_END, empty_end()), begin(b"a", 0)],
            &|fault| *fault == StreamFault::Duplicate,
        ),
        ("data too short", vec![a(), (DATA, vec![0; 12])], length),
        (
            "a block beyond the end",
            vec![a(), data(1 << 20, 10, 0, &[1; 10])],
            block,
        ),
        (
            "a block off the grid",
            vec![a(), data(5, 5, 0, &[1; 5])],
            block,
        ),
        (
            "too short a block",
            vec![a(), data(0, 9, 0, &[1; 9])],
            block,
        ),
        (
            "too long a block",
            vec![a(), data(0, 11, 0, &[1; 11])],
            block,
        ),
        (
            "the same block again",
            vec![a(), data(0, 10, 0, &[1; 10]), data(0, 10, 0, &[1; 10])],
            block,
        ),
        ("too few bytes", vec![a(), data(0, 10, 0, &[1; 9])], codec),
        ("too many bytes", vec![a(), data(0, 10, 0, &[1; 11])], codec),
        ("no zstd", vec![a(), data(0, 10, 1, &[1; 9])], codec),
        ("zstd of more", vec![a(), data(0, 10, 1, &bomb)], codec),
        (
            "an unknown codec",
            vec![a(), data(0, 10, 2, &[1; 10])],
            codec,
        ),
        (
            "a wrong number of blocks",
            vec![a(), (FILE_END, [1_u64.to_le_bytes(), [0; 8]].concat())],
            &|fault| matches!(fault, StreamFault::Content(_)),
        ),
        ("too long an end", vec![(END, vec![0; 13])], length),
        (
            "a wrong number of files",
            vec![(END, [&1_u32.to_le_bytes()[..], &[0; 8]].concat())],
            &|fault| matches!(fault, StreamFault::All(_)),
        ),
    ];
    for (what, records, expected) in cases {
        let (_, _, fault) = fault(&forged(&records));
        assert!(expected(&fault), "{what}: {fault}");
    }
    let many: Vec<_> = (0..=MAX_FILES)
        .flat_map(|n| [begin(n.to_string().as_bytes(), 0), (FILE_END, empty_end())])
        .collect();
    assert!(order(&fault(&forged(&many)).2));
}

fn empty_end() -> Vec<u8> {
    let content = XxHash64::oneshot(0, &[]).to_le_bytes();
    [[0; 8], content].concat()
}

/// Refused by its length, before anything of that length is allocated or read.
#[test]
fn a_forged_length_allocates_nothing() {
    let mut bytes = forged(&[begin(b"memory", 1 << 40)]);
    bytes.push(DATA);
    bytes.extend_from_slice(&u32::MAX.to_le_bytes());
    let StreamFault::Length { claimed, .. } = fault_of_blocks(&bytes) else {
        panic!("another fault");
    };
    assert_eq!(claimed, u64::from(u32::MAX));
    let error = take(&bytes[..]).unwrap_err().to_string();
    assert!(error.contains("claims 1099511627776 bytes"), "{error}");
}

fn fault_of_blocks(stream: &[u8]) -> StreamFault {
    let mut reader = StreamReader::new(stream).unwrap();
    reader.next_file().unwrap();
    match reader.next_block().unwrap_err() {
        StreamError::Broken { fault, .. } => fault,
        other => panic!("{other}"),
    }
}

#[test]
fn names_that_could_lead_elsewhere_are_refused() {
    let long = [b'a'; MAX_NAME];
    for good in [&b"a"[..], b"memory", b"state.vm-1_x", &long] {
        let stream = forged(&[begin(good, 0), (FILE_END, empty_end())]);
        // Only its end is missing.
        assert_eq!(fault(&stream).2, StreamFault::Truncated);
    }
    for bad in [
        &b""[..],
        b".",
        b"..",
        b".hidden",
        b"a/b",
        b"../a",
        b"/etc/passwd",
        b"a\0",
        b"a b",
        b"\xff",
        "\u{fc}".as_bytes(),
    ] {
        let (_, file, fault) = fault(&forged(&[begin(bad, 0)]));
        assert!(matches!(fault, StreamFault::Name(_)), "{bad:?}: {fault}");
        assert_eq!(file, None);
        let name = String::from_utf8_lossy(bad);
        assert!(
            StreamWriter::new(Vec::new())
                .unwrap()
                .bytes(&name, b"")
                .is_err()
        );
    }
    let mut writer = StreamWriter::new(Vec::new()).unwrap();
    writer.bytes("a", b"").unwrap();
    let error = writer.bytes("a", b"").unwrap_err().to_string();
    assert!(error.contains("second time"), "{error}");
}

#[test]
fn failures_of_the_carrier_are_no_faults_of_the_stream() {
    struct Failing<'a>(&'a [u8]);
    impl Read for Failing<'_> {
        fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
            match self.0.read(buffer) {
                Ok(0) => Err(io::Error::other("gone")),
                got => got,
            }
        }
    }
    let stream = tell(&sample());
    let error = take(Failing(&stream[..50])).unwrap_err();
    assert!(
        matches!(error, StreamError::Read { at: 50, .. }),
        "{error:?}"
    );
    let (reader, writer) = io::pipe().unwrap();
    drop(reader);
    let error = StreamWriter::new(writer).err().unwrap();
    assert!(matches!(error, StreamError::Write { .. }), "{error:?}");
}

prop_compose! {
    /// Runs of nothing, zeros, a pattern and noise.
    fn any_content()(runs in prop::collection::vec((0_u8..4, 1_usize..700_000, any::<u64>()), 0..6)) -> Vec<u8> {
        let mut bytes = Vec::new();
        for (kind, length, seed) in runs {
            match kind {
                0 | 1 => bytes.resize(bytes.len() + length, 0),
                2 => bytes.extend(std::iter::repeat_n(seed as u8, length)),
                _ => bytes.extend(noise(length, seed)),
            }
        }
        bytes
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn any_sparse_files_come_through(contents in prop::collection::vec(any_content(), 0..3)) {
        let dir = tempfile::tempdir().unwrap();
        let mut writer = StreamWriter::new(Vec::new()).unwrap();
        for (number, content) in contents.iter().enumerate() {
            let file = File::create_new(dir.path().join(number.to_string())).unwrap();
            file.set_len(content.len() as u64).unwrap();
            crate::sparse::write(&file, 0, content).unwrap();
            let file = File::open(dir.path().join(number.to_string())).unwrap();
            writer.file(&format!("f{number}"), &file, content.len() as u64).unwrap();
        }
        let stream = writer.finish().unwrap();
        let taken = take(&stream[..]).unwrap();
        let taken: Vec<_> = taken.into_iter().map(|(_, content)| content).collect();
        prop_assert!(taken == contents);
    }

    #[test]
    fn any_flipped_byte_is_refused(
        content in any_content(),
        place in any::<prop::sample::Index>(),
        change in 1_u8..,
    ) {
        let mut stream = tell(&vec![("a".to_owned(), content), ("b".to_owned(), vec![1, 2, 3])]);
        let at = place.index(stream.len());
        stream[at] ^= change;
        let refused = matches!(take(&stream[..]), Err(StreamError::Broken { .. }));
        prop_assert!(refused, "byte {at} changed by {change:#x}");
    }

    #[test]
    fn any_bytes_are_refused_without_a_panic(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
        let stream = [&MAGIC[..], &VERSION.to_le_bytes(), &bytes].concat();
        prop_assert!(take(&stream[..]).is_err());
    }
}
