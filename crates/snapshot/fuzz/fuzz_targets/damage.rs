//! A good artefact, damaged step by step: cut off, bits flipped, sizes forged, pieces lost and doubled. What is
//! read of it is what went in, or an error. Once its checksums are made to fit the damage, what is read still
//! has the checksum that its entry names.
#![no_main]
mod budget;

use std::{fs, path::Path, sync::LazyLock};

use doze_snapshot::{
    Algorithm, Artefact, Cancel, ChunkSize, Codec, CompressOptions, compress_file,
    format::{FOOTER, Tail, checksum},
};
use libfuzzer_sys::fuzz_target;
use twox_hash::XxHash64;

const CHUNK: usize = 64 << 10;
/// Steps at most; a few make anything unreadable.
const STEPS: usize = 6;
// Places in the info frame and the table, which the format's documentation draws.
const INFO_PAYLOAD: usize = 8;
const ENTRIES_HASH: usize = INFO_PAYLOAD + 28;
const INFO_HASH: usize = INFO_PAYLOAD + 36;
const TABLE_ENTRIES: usize = 52 + 8;
const ENTRY: usize = 12;

struct Good {
    raw: Vec<u8>,
    /// One per algorithm.
    packed: [Vec<u8>; 2],
}

/// A chunk of text, one of zeros, one of text and noise, and a short end.
static GOOD: LazyLock<Good> = LazyLock::new(|| {
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let mut noise = |length: usize| {
        let mut bytes = Vec::with_capacity(length + 8);
        while bytes.len() < length {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            bytes.extend_from_slice(&state.to_le_bytes());
        }
        bytes.truncate(length);
        bytes
    };
    let text = |length: usize| -> Vec<u8> {
        let line = b"a line that comes again and again, and ";
        line.iter().copied().cycle().take(length).collect()
    };
    let mut raw = text(CHUNK);
    raw.resize(2 * CHUNK, 0);
    raw.extend(text(CHUNK / 2));
    raw.extend(noise(CHUNK / 2));
    raw.extend(text(777));
    let packed = [Algorithm::Zstd, Algorithm::Lz4].map(|algorithm| {
        let folder = std::env::temp_dir().join(format!("doze-fuzz-{}", std::process::id()));
        fs::create_dir_all(&folder).expect("a folder");
        let (from, to) = (folder.join("raw"), folder.join("packed"));
        fs::write(&from, &raw).expect("a raw file");
        let options = CompressOptions {
            chunk_size: ChunkSize::new(CHUNK as u64).expect("a chunk size"),
            ..CompressOptions::new(Codec::new(algorithm, None).expect("the default exists"))
        };
        compress_file(&from, &to, options, &Cancel::new(), &mut |_| {}).expect("an artefact");
        let bytes = fs::read(&to).expect("the artefact");
        fs::remove_dir_all(&folder).expect("the folder goes again");
        bytes
    });
    Good { raw, packed }
});

/// Numbers out of the fuzzer's bytes; zeros when they run out.
struct Choices<'a>(&'a [u8]);

impl Choices<'_> {
    fn byte(&mut self) -> u8 {
        let Some((&first, rest)) = self.0.split_first() else {
            return 0;
        };
        self.0 = rest;
        first
    }

    fn number(&mut self) -> u32 {
        u32::from_le_bytes(std::array::from_fn(|_| self.byte()))
    }

    /// Below `end`, which is more than 0.
    fn below(&mut self, end: usize) -> usize {
        self.number() as usize % end
    }
}

/// Where info frame and table begin, if the end can still be found.
fn end_of(bytes: &[u8]) -> Option<usize> {
    let tail = Tail::parse(bytes.last_chunk::<FOOTER>()?, bytes.len() as u64).ok()?;
    Some(bytes.len() - tail.length)
}

fn overwrite(bytes: &mut [u8], at: usize, new: &[u8]) {
    if let Some(place) = bytes.get_mut(at..at + new.len()) {
        place.copy_from_slice(new);
    }
}

/// Both hashes of the info frame as the damage wants them.
fn mend(bytes: &mut [u8]) {
    let Some(start) = end_of(bytes) else { return };
    let end = &mut bytes[start..];
    let Some(entries) = end.get(TABLE_ENTRIES..end.len().saturating_sub(FOOTER + ENTRY)) else {
        return;
    };
    let hash = XxHash64::oneshot(0, entries).to_le_bytes();
    overwrite(end, ENTRIES_HASH, &hash);
    let hash = XxHash64::oneshot(0, &end[INFO_PAYLOAD..INFO_HASH]).to_le_bytes();
    overwrite(end, INFO_HASH, &hash);
}

/// One step; whether it mended the checksums.
fn step(bytes: &mut Vec<u8>, choices: &mut Choices<'_>) -> bool {
    if bytes.is_empty() {
        return false;
    }
    let length = bytes.len();
    match choices.byte() % 8 {
        0 => bytes.truncate(choices.below(length)),
        1 => {
            let at = choices.below(length);
            bytes[at] ^= 1 << (choices.byte() % 8);
        }
        2 => {
            let at = choices.below(length);
            bytes[at] = choices.byte();
        }
        // Any field of any entry.
        3 => {
            if let Some(start) = end_of(bytes) {
                let fields = (length - start - TABLE_ENTRIES) / 4;
                let at = start + TABLE_ENTRIES + 4 * choices.below(fields.max(1));
                overwrite(bytes, at, &choices.number().to_le_bytes());
            }
        }
        // Any field of the info frame: sizes, counts, level, version.
        4 => {
            if let Some(start) = end_of(bytes) {
                let at = start + choices.below(TABLE_ENTRIES);
                overwrite(bytes, at, &choices.number().to_le_bytes());
            }
        }
        5 => {
            let from = choices.below(length);
            let to = from + choices.below(length - from);
            bytes.drain(from..to);
        }
        // Not longer than it was twice: what it costs is to be seen, not the fuzzer's own patience.
        6 if length < 2 * GOOD.packed[1].len() => {
            let from = choices.below(length);
            let piece = bytes[from..from + choices.below(length - from)].to_vec();
            let at = choices.below(length);
            bytes.splice(at..at, piece);
        }
        _ => {
            mend(bytes);
            return true;
        }
    }
    false
}

fn read(bytes: &[u8], mended: bool) {
    let Ok(artefact) = Artefact::new(bytes, Path::new("fuzz")) else {
        return;
    };
    let table = artefact.table();
    if !mended {
        assert_eq!(table.raw_size, GOOD.raw.len() as u64);
    }
    let algorithm = table.codec.algorithm();
    let mut reader = artefact.reader().expect("memory for a decoder");
    for index in 0..table.entries.len() as u64 {
        let length = table.chunk_length(index);
        let Ok(read) = reader.read(index) else {
            continue;
        };
        if mended {
            let found = read.map_or_else(
                || checksum(algorithm, &vec![0; length]),
                |raw| checksum(algorithm, raw),
            );
            assert_eq!(found, table.entries[index as usize].checksum);
            continue;
        }
        let at = index as usize * CHUNK;
        let good = &GOOD.raw[at..at + length];
        match read {
            Some(raw) => assert!(raw == good, "chunk {index} is not what went in"),
            None => assert!(good.iter().all(|byte| *byte == 0), "chunk {index} is lost"),
        }
    }
}

fuzz_target!(|input: &[u8]| {
    let mut choices = Choices(input);
    let mut bytes = GOOD.packed[usize::from(choices.byte() % 2)].clone();
    let mut mended = false;
    for _ in 0..STEPS {
        if choices.0.is_empty() {
            break;
        }
        mended |= step(&mut bytes, &mut choices);
    }
    // The test's own comparison with a chunk of zeros counts too.
    let comparison = if mended {
        ChunkSize::MAX.bytes() as usize
    } else {
        0
    };
    budget::within(bytes.len() + comparison, ChunkSize::MAX.bytes(), || {
        read(&bytes, mended);
    });
});
