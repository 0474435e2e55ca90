//! Any bytes as a stream, once as they are and once with every record's checksum made right, so that the checks
//! behind them are reached too. What is accepted must be the same when it is told and taken again.
#![no_main]
use doze_snapshot::stream::{StreamError, StreamReader, StreamWriter};
use libfuzzer_sys::fuzz_target;
use twox_hash::XxHash64;

// Of the format's documentation.
const HEADER: usize = 16;
const RECORD_HEADER: usize = 5;
/// Bytes of a file that are read at most.
const CAP: usize = 4 << 20;

fn take(bytes: &[u8]) -> Result<Vec<(String, Vec<u8>)>, StreamError> {
    let mut reader = StreamReader::new(bytes)?;
    let mut files = Vec::new();
    while let Some(header) = reader.next_file()? {
        let content = reader.small(&header, CAP)?;
        assert_eq!(content.len() as u64, header.size);
        files.push((header.name, content));
    }
    Ok(files)
}

fn read(bytes: &[u8]) {
    let Ok(files) = take(bytes) else {
        return;
    };
    let mut writer = StreamWriter::new(Vec::new()).expect("a Vec takes all");
    for (name, content) in &files {
        writer.bytes(name, content).expect("what was read is good");
    }
    let again = writer.finish().expect("a Vec takes all");
    assert_eq!(take(&again).expect("what was written is good"), files);
}

/// The same with the checksums of records as they should be.
fn mended(bytes: &[u8]) -> Option<Vec<u8>> {
    let (header, mut rest) = bytes.split_at_checked(HEADER)?;
    let mut mended = header.to_vec();
    for number in 0.. {
        let Some(length) = rest.get(1..RECORD_HEADER) else {
            break;
        };
        let length = u32::from_le_bytes(length.try_into().ok()?) as usize;
        let Some((record, after)) = rest.split_at_checked(RECORD_HEADER.checked_add(length)?)
        else {
            break;
        };
        mended.extend_from_slice(record);
        mended.extend_from_slice(&XxHash64::oneshot(number, record).to_le_bytes());
        rest = after.get(8..).unwrap_or_default();
    }
    mended.extend_from_slice(rest);
    Some(mended)
}

fuzz_target!(|bytes: &[u8]| {
    read(bytes);
    if let Some(bytes) = mended(bytes) {
        read(&bytes);
    }
});
