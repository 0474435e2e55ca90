//! What a sleeping guest is on disk: its manifest ([`manifest`]), its memory packed, and all of it as one stream
//! to another host ([`stream`]).
//!
//! The memory image codec: a sleeping instance's `memory` file to a `memory.zst` or `memory.lz4` and
//! back, without ever being in the way.
//!
//! ```text
//!  raw, sparse file      |  data  | hole .................. |  data  | zero |  data (shorter)
//!  chunks of 1 MiB       |   0    |   1   |   2   |    3    |   4    |  5   |   6
//!                            |        \_______|_______/         |       |       |
//!  workers (all cores)    compress   one frame of zeros,     compress  same  compress
//!                            |        made once                 |       |       |
//!  artefact, in order    [ frame ][ frame ][ frame ][ frame ][ frame ][ frame ][ frame ][info][table]
//! ```
//!
//! Every frame stands alone, so all cores write and read them and any chunk can be read by itself. All
//! of it is what the formats' own tools expect: `zstd -d` and `lz4 -d` give the raw file back, bit for
//! bit, and skip the two frames at the end (see [`format`]).
//!
//! Promises:
//! - **All or nothing.** [`compress_file`] and [`decompress_file`] write a stage file, sync it, read it
//!   back and check it, and only then give it its name. The name never exists before, nor over an
//!   existing file; after an error or a cancel there is no stage file either. After `kill -9` there is
//!   one, with a name that [`doze_host::files::is_stage_name`] knows.
//! - **Cancelled means gone.** [`Cancel`] is noticed within 50 ms also inside a chunk at zstd 19, and when
//!   the function returns no thread of it reads or writes any more, so the caller may remove what it read.
//! - **Bounded.** Memory is a few chunks per worker; sizes read from a file are checked against
//!   [`format`]'s caps before anything is allocated for them.
//! - **Checked.** Every frame carries a checksum of its content, the table repeats it, and the info frame
//!   covers the table. An error names the chunk and its offset.
//!
//! Chunks are 1 MiB. Smaller ones cost size, because a frame begins without history (zstd 1 looks back
//! 512 KiB), and larger ones cost memory, cancel latency and the time for one page when the artefact is
//! once served lazily. The measurements are in docs/performance.md.
pub mod format;
pub mod manifest;
pub mod stream;

mod artefact;
mod cancel;
mod closing;
mod codec;
mod compress;
mod decompress;
mod error;
mod fields;
mod options;
mod pool;
mod sparse;
mod stage;

pub use artefact::{Artefact, ChunkReader, Inspection, ReadAt, inspect_file, verify_file};
pub use cancel::Cancel;
pub use closing::wait_for_space;
pub use compress::compress_file;
pub use decompress::decompress_file;
pub use error::{Error, Fault};
pub use options::{
    Algorithm, ChunkSize, Codec, CompressOptions, DecompressOptions, Phase, Progress, Report,
    Timings,
};
