//! Finds out from the first bytes how a stream is compressed. Media types are not asked: they lie
//! in archives that tools have rewritten, and the digests prove the content anyway.
use std::io::{self, BufReader, Cursor, Read};

/// Longest magic number looked for.
const MAGIC: u64 = 6;

/// The plain content of a gzip, zstd or uncompressed stream.
///
/// # Errors
/// `Unsupported` for bzip2 and xz, which the OCI image specification does not have (layer.md,
/// "Distributable Format").
pub(crate) fn decompress<'r, R: Read + 'r>(mut stream: R) -> io::Result<Box<dyn Read + 'r>> {
    let mut magic = Vec::new();
    stream.by_ref().take(MAGIC).read_to_end(&mut magic)?;
    let compressed = is_compressed(&magic);
    let is_gzip = magic.starts_with(&[0x1f, 0x8b]);
    let unsupported = if magic.starts_with(b"BZh") {
        Some("bzip2")
    } else if magic.starts_with(&[0xfd, b'7', b'z', b'X', b'Z', 0]) {
        Some("xz")
    } else {
        None
    };
    if let Some(name) = unsupported {
        return Err(io::Error::new(
            io::ErrorKind::Unsupported,
            format!("{name} compression is not supported; allowed: gzip, zstd, none"),
        ));
    }
    let whole = BufReader::with_capacity(128 * 1024, Cursor::new(magic).chain(stream));
    Ok(match (compressed, is_gzip) {
        (false, _) => Box::new(whole),
        // Several members or frames one after the other are one stream (RFC 1952 2.2, RFC 8878 3).
        (true, true) => Box::new(flate2::bufread::MultiGzDecoder::new(whole)),
        (true, false) => Box::new(zstd::stream::read::Decoder::with_buffer(whole)?),
    })
}

/// Whether these first bytes begin a gzip or zstd stream.
pub(crate) fn is_compressed(magic: &[u8]) -> bool {
    // RFC 1952 2.3.1; RFC 8878 3.1.1 and, for a leading skippable frame, 3.1.2.
    magic.starts_with(&[0x1f, 0x8b])
        || magic.starts_with(&[0x28, 0xb5, 0x2f, 0xfd])
        || matches!(magic, [first, 0x2a, 0x4d, 0x18, ..] if first & 0xf0 == 0x50)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use std::io::Write;

    use super::*;

    fn read(stream: &[u8]) -> io::Result<Vec<u8>> {
        let mut content = Vec::new();
        decompress(stream)?.read_to_end(&mut content)?;
        Ok(content)
    }

    fn gzip(content: &[u8]) -> Vec<u8> {
        let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        encoder.write_all(content).unwrap();
        encoder.finish().unwrap()
    }

    #[test]
    fn the_content_decides() {
        let text = b"some text that is longer than any magic number";
        assert_eq!(read(text).unwrap(), text);
        assert_eq!(read(b"").unwrap(), b"");
        assert_eq!(read(b"abc").unwrap(), b"abc");
        assert_eq!(read(&gzip(text)).unwrap(), text);
        assert_eq!(
            read(&zstd::encode_all(&text[..], 1).unwrap()).unwrap(),
            text
        );
    }

    #[test]
    fn members_and_frames_are_joined() {
        assert_eq!(
            read(&[gzip(b"one "), gzip(b"two")].concat()).unwrap(),
            b"one two"
        );
        let frame = |text: &[u8]| zstd::encode_all(text, 1).unwrap();
        let skippable = [0x50, 0x2a, 0x4d, 0x18, 2, 0, 0, 0, 7, 7];
        let stream = [&skippable[..], &frame(b"one "), &frame(b"two")].concat();
        assert_eq!(read(&stream).unwrap(), b"one two");
    }

    #[test]
    fn cut_off_and_unknown_streams_are_errors() {
        let cut = gzip(b"some text");
        assert!(read(&cut[..cut.len() - 9]).is_err());
        let cut = zstd::encode_all(&b"some text"[..], 1).unwrap();
        assert!(read(&cut[..cut.len() - 3]).is_err());
        for magic in [&b"BZh91AY"[..], b"\xfd7zXZ\0\0"] {
            assert_eq!(read(magic).unwrap_err().kind(), io::ErrorKind::Unsupported);
        }
    }
}
