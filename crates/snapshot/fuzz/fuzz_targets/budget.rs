//! What reading an artefact may allocate, whatever the artefact says.
use doze_snapshot::ChunkSize;
use peak_alloc::PeakAlloc;

#[global_allocator]
static MEMORY: PeakAlloc = PeakAlloc;

/// Paths, errors, and a frame of zeros that is remembered (32 KiB at most).
const SMALL_CHANGE: usize = 64 << 10;

/// Runs `f`, which reads an artefact of `length` bytes through one reader.
///
/// Its end costs its bytes and at most twice as much for what is made of them (entries of 12 bytes become 24 or
/// fewer), a reader one chunk and one frame. Nothing of that goes beyond the file's own length, the chunk
/// excepted.
pub fn within<T>(length: usize, largest_chunk: u64, f: impl FnOnce() -> T) -> T {
    assert!(largest_chunk <= ChunkSize::MAX.bytes());
    let cap = 4 * length + largest_chunk as usize + SMALL_CHANGE;
    MEMORY.reset_peak_usage();
    let before = MEMORY.current_usage();
    let result = f();
    let used = MEMORY.peak_usage().saturating_sub(before);
    assert!(used <= cap, "{used} bytes for {length}; {cap} are declared");
    result
}
