//! Files that are either whole or absent after a power cut. All blocking.
use std::{io, path::Path};

/// Stage file in the same folder, write, fsync, rename over `path`, fsync the folder.
pub fn write_atomic(path: &Path, content: &[u8], mode: u32) -> io::Result<()> {
    let _ = (path, content, mode);
    unimplemented!()
}
/// Creates the folder (and parents) with mode 0700 and fsyncs its parent. Existing: mode is checked to not be wider.
pub fn create_private_dir(path: &Path) -> io::Result<()> {
    let _ = path;
    unimplemented!()
}
pub fn fsync_dir(path: &Path) -> io::Result<()> {
    let _ = path;
    unimplemented!()
}
/// New sparse file of `size` bytes, mode 0600; an error when it exists.
pub fn create_sparse(path: &Path, size: u64) -> io::Result<()> {
    let _ = (path, size);
    unimplemented!()
}
/// Removes a file or folder tree without following links out of it; absent is fine. Fsyncs the parent.
pub fn remove_tree(path: &Path) -> io::Result<()> {
    let _ = path;
    unimplemented!()
}
/// Whether `FICLONE` works inside `dir`, found by trying it.
pub fn supports_reflink(dir: &Path) -> io::Result<bool> {
    let _ = dir;
    unimplemented!()
}
/// Bytes available to us on the file system that holds `path`.
pub fn free_space(path: &Path) -> io::Result<u64> {
    let _ = path;
    unimplemented!()
}
/// Bytes really allocated by the tree below `path`.
pub fn allocated_bytes(path: &Path) -> io::Result<u64> {
    let _ = path;
    unimplemented!()
}
