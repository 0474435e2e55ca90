//! Holes: found when a file is read, left out when it is written.
use std::{fs::File, io, os::unix::fs::FileExt};

use rustix::{
    fs::{SeekFrom, seek},
    io::Errno,
};

/// What stays a hole: the page, of guests and of file systems.
const PAGE: usize = 4096;
/// Compared at once; long enough for the compiler to use the widest registers there are.
const LANE: usize = 128;

/// Whether there are bytes and all of them are zero.
pub fn is_zero(bytes: &[u8]) -> bool {
    let lanes = bytes.chunks_exact(LANE);
    let rest = lanes.remainder();
    !bytes.is_empty()
        && rest.iter().all(|byte| *byte == 0)
        && lanes
            .into_iter()
            .all(|lane| lane.iter().fold(0, |all, byte| all | byte) == 0)
}

/// Reads `buffer.len()` bytes at `offset`, asking the file system for holes first. Returns `false`, with
/// the buffer untouched, when all of it is a hole.
///
/// Uses the descriptor's position, but only in calls that set it.
///
/// # Errors
/// `UnexpectedEof` when data ends before the range does. A range beyond the end is taken for a hole.
pub fn read(file: &File, offset: u64, buffer: &mut [u8]) -> io::Result<bool> {
    let end = offset + buffer.len() as u64;
    // Differences of positions inside the buffer, hence no larger than a usize.
    let index = |at: u64| (at - offset) as usize;
    let mut at = offset;
    while at < end {
        let data = match seek(file, SeekFrom::Data(at)) {
            Ok(data) => data.min(end),
            Err(Errno::NXIO) => end,
            // A file system that knows no holes: all is data.
            Err(Errno::INVAL | Errno::OPNOTSUPP) => at,
            Err(error) => return Err(error.into()),
        };
        if at == offset && data == end {
            return Ok(false);
        }
        buffer[index(at)..index(data)].fill(0);
        if data == end {
            break;
        }
        let hole = match seek(file, SeekFrom::Hole(data)) {
            Ok(hole) if hole > data => hole.min(end),
            Ok(_) | Err(Errno::NXIO | Errno::INVAL | Errno::OPNOTSUPP) => end,
            Err(error) => return Err(error.into()),
        };
        file.read_exact_at(&mut buffer[index(data)..index(hole)], data)?;
        at = hole;
    }
    Ok(!buffer.is_empty())
}

/// Where the next data begins, at `offset` or after it; `None` when there is none.
///
/// # Errors
/// Of the file.
pub fn next_data(file: &File, offset: u64) -> io::Result<Option<u64>> {
    match seek(file, SeekFrom::Data(offset)) {
        Ok(data) => Ok(Some(data)),
        Err(Errno::NXIO) => Ok(None),
        // A file system that knows no holes: all is data.
        Err(Errno::INVAL | Errno::OPNOTSUPP) => Ok(Some(offset)),
        Err(error) => Err(error.into()),
    }
}

/// Writes the pages of `bytes` that are not zero to a file whose range at `offset` is a hole.
pub fn write(file: &File, offset: u64, bytes: &[u8]) -> io::Result<()> {
    let mut run = 0;
    let mut at = 0;
    for page in bytes.chunks(PAGE) {
        if is_zero(page) {
            if run < at {
                file.write_all_at(&bytes[run..at], offset + run as u64)?;
            }
            run = at + page.len();
        }
        at += page.len();
    }
    if run < at {
        file.write_all_at(&bytes[run..at], offset + run as u64)?;
    }
    Ok(())
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests")]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn one_bit_anywhere_is_not_zero() {
        assert!(!is_zero(&[]));
        for length in [1, 127, 128, 129, 4096, 5000] {
            let mut bytes = vec![0; length];
            assert!(is_zero(&bytes));
            for at in 0..length {
                bytes[at] = 0x80;
                assert!(!is_zero(&bytes), "{at} of {length}");
                bytes[at] = 0;
            }
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        #[test]
        fn what_is_written_is_read(pages in prop::collection::vec(any::<Option<u8>>(), 1..40), cut in 0_usize..PAGE) {
            let mut bytes: Vec<u8> = pages
                .iter()
                .flat_map(|page| vec![page.unwrap_or(0); PAGE])
                .collect();
            bytes.truncate(bytes.len() - cut);
            let file = tempfile::tempfile().unwrap();
            file.set_len(bytes.len() as u64 + 8192).unwrap();
            write(&file, 8192, &bytes).unwrap();
            let mut got = vec![0xee; bytes.len()];
            if read(&file, 8192, &mut got).unwrap() {
                prop_assert_eq!(&got, &bytes);
            } else {
                prop_assert!(is_zero(&bytes));
            }
        }
    }
}
