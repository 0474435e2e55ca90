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
