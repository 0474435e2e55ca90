//! From a bzImage to the uncompressed kernel inside it.
//!
//! An uncompressed kernel boots two seconds faster under TCG, where decompressing is the guest's work,
//! and is the only kind the other monitors take.
//!
//! ```text
//!   boot sector, setup code | decompressor .. payload (compressed vmlinux [+ size]) .. | ...
//!   (setup_sects + 1) * 512 ^-- payload_offset -->^
//! ```
//! Offsets and protocol: Linux, Documentation/arch/x86/boot.rst. PVH entry: xen/interface/elfnote.h.
use std::{borrow::Cow, io::Read};

/// Nobody's kernel is larger; a broken length must not eat the host's memory.
const MAX_KERNEL: u64 = 1 << 30;

/// `XEN_ELFNOTE_PHYS32_ENTRY`: where a PVH boot enters.
const PVH_NOTE: u32 = 18;

/// The payload's offset is in the header from this boot protocol on.
const OLDEST_PROTOCOL: u16 = 0x0208;

/// The uncompressed kernel of an image, which may be one already. Errors are for operators.
pub(super) fn extract(image: &[u8]) -> Result<Cow<'_, [u8]>, String> {
    let kernel = if image.starts_with(b"\x7fELF") {
        Cow::Borrowed(image)
    } else {
        Cow::Owned(decompress(payload(image)?)?)
    };
    check_elf(&kernel)?;
    Ok(kernel)
}

/// The version a kernel reports of itself: the first word after `Linux version `.
pub(super) fn version(kernel: &[u8]) -> Option<&str> {
    const BANNER: &[u8] = b"Linux version ";
    let mut rest = kernel;
    loop {
        let at = memchr::memmem::find(rest, BANNER)?;
        rest = &rest[at + BANNER.len()..];
        let end = rest.iter().position(|byte| !byte.is_ascii_graphic())?;
        let word = std::str::from_utf8(&rest[..end]).ok()?;
        // Format strings contain the words, too.
        if word.starts_with(|c: char| c.is_ascii_digit()) {
            return Some(word);
        }
    }
}

fn payload(image: &[u8]) -> Result<&[u8], String> {
    let not = "it is neither an ELF file nor a bzImage (no boot header)";
    if field::<4>(image, 0x202) != Some(*b"HdrS") {
        return Err(not.to_owned());
    }
    let protocol = u16::from_le_bytes(field(image, 0x206).ok_or(not)?);
    if protocol < OLDEST_PROTOCOL {
        return Err(format!(
            "its boot protocol is {}.{:02}, needed is 2.08 (Linux 2.6.24) or newer",
            protocol >> 8,
            protocol & 0xff
        ));
    }
    // 0 stands for 4, for the oldest boot loaders' sake.
    let setup_sects = match image.get(0x1f1) {
        Some(0) | None => 4,
        Some(sects) => usize::from(*sects),
    };
    let offset = u32::from_le_bytes(field(image, 0x248).ok_or(not)?);
    let length = u32::from_le_bytes(field(image, 0x24c).ok_or(not)?);
    let start = (setup_sects + 1) * 512 + offset as usize;
    image
        .get(start..start.saturating_add(length as usize))
        .filter(|payload| payload.len() > 8)
        .ok_or_else(|| {
            format!(
                "its header names a payload of {length} bytes at {start}, the file has {}",
                image.len()
            )
        })
}

fn decompress(payload: &[u8]) -> Result<Vec<u8>, String> {
    // The build appends the uncompressed size where the format does not carry it (`size_append`).
    let without_size = &payload[..payload.len() - 4];
    let broken = |e: std::io::Error| format!("its compressed payload is broken: {e}");
    match payload {
        [0x02, 0x21, 0x4c, 0x18, ..] => {
            read(lz4_flex::frame::FrameDecoder::new(without_size)).map_err(broken)
        }
        [0x1f, 0x8b, ..] => read(flate2::read::GzDecoder::new(payload)).map_err(broken),
        [0x28, 0xb5, 0x2f, 0xfd, ..] => zstd::stream::read::Decoder::with_buffer(without_size)
            .and_then(|decoder| read(decoder.single_frame()))
            .map_err(broken),
        [0x7f, b'E', b'L', b'F', ..] => Ok(payload.to_vec()),
        other => Err(format!(
            "its payload is compressed with {}; lz4, gzip and zstd are supported. Unpack it with Linux' \
             scripts/extract-vmlinux and configure the vmlinux",
            method_of(other)
        )),
    }
}

fn read(decoder: impl Read) -> std::io::Result<Vec<u8>> {
    let mut kernel = Vec::new();
    decoder.take(MAX_KERNEL + 1).read_to_end(&mut kernel)?;
    if kernel.len() as u64 > MAX_KERNEL {
        return Err(std::io::Error::other(format!(
            "more than {MAX_KERNEL} bytes come out of it"
        )));
    }
    Ok(kernel)
}

fn method_of(payload: &[u8]) -> &'static str {
    match payload {
        [0xfd, b'7', b'z', b'X', b'Z', ..] => "xz",
        [b'B', b'Z', b'h', ..] => "bzip2",
        [0x5d, 0, 0, ..] => "lzma",
        [0x89, b'L', b'Z', b'O', ..] => "lzo",
        _ => "a method we do not know",
    }
}

/// A 64-bit x86 executable with a PVH entry, all of it there.
fn check_elf(kernel: &[u8]) -> Result<(), String> {
    // ELF64 little endian; e_machine 62 is EM_X86_64.
    if field::<6>(kernel, 0) != Some(*b"\x7fELF\x02\x01") {
        return Err("the kernel inside is not a 64-bit little-endian ELF file".to_owned());
    }
    if field::<2>(kernel, 18) != Some([62, 0]) {
        return Err("the kernel is not for x86-64".to_owned());
    }
    let truncated = || "the kernel's ELF file is truncated".to_owned();
    let headers = u64::from_le_bytes(field(kernel, 32).ok_or_else(truncated)?);
    let size = u16::from_le_bytes(field(kernel, 54).ok_or_else(truncated)?);
    let count = u16::from_le_bytes(field(kernel, 56).ok_or_else(truncated)?);
    let mut pvh = false;
    for i in 0..u64::from(count) {
        let at = usize::try_from(headers.saturating_add(i * u64::from(size)))
            .map_err(|_| truncated())?;
        let kind = u32::from_le_bytes(field(kernel, at).ok_or_else(truncated)?);
        let offset = u64::from_le_bytes(field(kernel, at.saturating_add(8)).ok_or_else(truncated)?);
        let length =
            u64::from_le_bytes(field(kernel, at.saturating_add(32)).ok_or_else(truncated)?);
        let segment = slice(kernel, offset, length).ok_or_else(truncated)?;
        // PT_NOTE
        pvh |= kind == 4 && has_pvh_note(segment);
    }
    if pvh {
        return Ok(());
    }
    Err(
        "it has no PVH entry point: it was built without CONFIG_PVH (Debian's kernels have it)"
            .to_owned(),
    )
}

/// Walks `namesz, descsz, type, name, desc`, the latter two padded to 4 bytes (elf(5)).
fn has_pvh_note(mut notes: &[u8]) -> bool {
    while let (Some(name), Some(desc), Some(kind)) = (
        field(notes, 0).map(u32::from_le_bytes),
        field(notes, 4).map(u32::from_le_bytes),
        field(notes, 8).map(u32::from_le_bytes),
    ) {
        if kind == PVH_NOTE && slice(notes, 12, u64::from(name)) == Some(b"Xen\0") {
            return true;
        }
        let next = 12 + u64::from(name).next_multiple_of(4) + u64::from(desc).next_multiple_of(4);
        let Some(rest) = usize::try_from(next)
            .ok()
            .and_then(|next| notes.get(next..))
        else {
            return false;
        };
        notes = rest;
    }
    false
}

fn field<const N: usize>(bytes: &[u8], at: usize) -> Option<[u8; N]> {
    bytes.get(at..at.checked_add(N)?)?.try_into().ok()
}

fn slice(bytes: &[u8], offset: u64, length: u64) -> Option<&[u8]> {
    let start = usize::try_from(offset).ok()?;
    let end = usize::try_from(offset.checked_add(length)?).ok()?;
    bytes.get(start..end)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, reason = "tests")]
    use std::io::Write;

    use proptest::prelude::*;

    use super::*;

    /// An ELF64 file with one PT_NOTE segment that holds these notes.
    fn elf(notes: &[(&[u8], u32, &[u8])]) -> Vec<u8> {
        let mut segment = Vec::new();
        for (name, kind, desc) in notes {
            for number in [name.len() as u32, desc.len() as u32, *kind] {
                segment.extend(number.to_le_bytes());
            }
            for part in [name, desc] {
                segment.extend(*part);
                segment.resize(segment.len().next_multiple_of(4), 0);
            }
        }
        let mut file = vec![0_u8; 64 + 56];
        file[..6].copy_from_slice(b"\x7fELF\x02\x01");
        file[18] = 62;
        file[32] = 64;
        file[54] = 56;
        file[56] = 1;
        file[64] = 4;
        file[64 + 8] = 120;
        file[64 + 32..64 + 40].copy_from_slice(&(segment.len() as u64).to_le_bytes());
        file.extend(segment);
        file.extend(b"\0Linux version %s (%s)\0Linux version 6.1.0-doze (x@y) #1\0");
        file
    }

    fn kernel() -> Vec<u8> {
        elf(&[
            (b"GNU\0", 3, b"build id"),
            (b"Xen\0", 6, b"linux\0"),
            (b"Xen\0", PVH_NOTE, &[0; 8]),
        ])
    }

    /// A bzImage around a payload, 512 * 3 bytes of setup.
    fn bzimage(payload: &[u8]) -> Vec<u8> {
        let mut image = vec![0_u8; 512 * 3];
        image[0x1f1] = 2;
        image[0x202..0x206].copy_from_slice(b"HdrS");
        image[0x206..0x208].copy_from_slice(&0x020f_u16.to_le_bytes());
        image[0x248..0x24c].copy_from_slice(&7_u32.to_le_bytes());
        image[0x24c..0x250].copy_from_slice(&(payload.len() as u32).to_le_bytes());
        image.extend([0xcc; 7]);
        image.extend(payload);
        image.extend([0xcc; 99]);
        image
    }

    fn with_size(mut compressed: Vec<u8>, kernel: &[u8]) -> Vec<u8> {
        compressed.extend((kernel.len() as u32).to_le_bytes());
        compressed
    }

    fn gzip(kernel: &[u8]) -> Vec<u8> {
        let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        encoder.write_all(kernel).unwrap();
        encoder.finish().unwrap()
    }

    fn lz4(kernel: &[u8]) -> Vec<u8> {
        // The legacy frame that the kernel's build makes: magic, then blocks with their lengths.
        let mut frame = vec![0x02, 0x21, 0x4c, 0x18];
        for chunk in kernel.chunks(8 << 20) {
            let block = lz4_flex::block::compress(chunk);
            frame.extend((block.len() as u32).to_le_bytes());
            frame.extend(block);
        }
        with_size(frame, kernel)
    }

    #[test]
    fn every_supported_method_gives_the_kernel_back() {
        let kernel = kernel();
        let zstd = with_size(zstd::encode_all(&kernel[..], 3).unwrap(), &kernel);
        for payload in [gzip(&kernel), lz4(&kernel), zstd, kernel.clone()] {
            let image = bzimage(&payload);
            assert_eq!(extract(&image).unwrap(), kernel);
        }
        assert_eq!(extract(&kernel).unwrap(), kernel);
        assert_eq!(version(&kernel), Some("6.1.0-doze"));
        assert_eq!(version(b"no banner"), None);
    }

    #[test]
    fn what_cannot_boot_is_refused_with_the_reason() {
        let refused = |image: &[u8], word: &str| {
            let reason = extract(image).unwrap_err();
            assert!(reason.contains(word), "{reason:?} does not say {word:?}");
        };
        refused(b"", "neither an ELF file nor a bzImage");
        refused(&[0; 4096], "neither an ELF file nor a bzImage");
        refused(&bzimage(b"\xfd7zXZ\0 and more"), "compressed with xz");
        refused(&bzimage(b"something else"), "a method we do not know");
        refused(&bzimage(b"x"), "payload");
        refused(&bzimage(&gzip(&kernel())[..40]), "payload is broken");
        refused(&bzimage(&gzip(b"not a kernel")), "not a 64-bit");
        refused(
            &elf(&[(b"GNU\0", PVH_NOTE, b""), (b"Xen\0", 6, b"")]),
            "CONFIG_PVH",
        );
        refused(&kernel()[..150], "truncated");
        let mut old = bzimage(&gzip(&kernel()));
        old[0x206] = 0x07;
        refused(&old, "boot protocol is 2.07");
        let mut arm = kernel();
        arm[18] = 183;
        refused(&arm, "not for x86-64");
        let image = bzimage(&gzip(&kernel()));
        refused(&image[..image.len() - 200], "the file has");
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(32))]
        #[test]
        fn no_input_panics(at in 0_usize..2000, byte: u8, cut in 0_usize..2500) {
            let mut image = bzimage(&lz4(&kernel()));
            let at = at % image.len();
            image[at] = byte;
            let _ = extract(&image[..cut.min(image.len())]);
            let _ = extract(&image);
            let mut file = kernel();
            let at = at % file.len();
            file[at] = byte;
            let _ = extract(&file);
            let _ = version(&file);
        }
    }
}
