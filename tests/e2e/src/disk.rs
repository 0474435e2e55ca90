//! A small file system of one world's own, below its data folder: it can be filled, and lose its power.
//!
//! Mounted inside the run's private mount namespace (`ip netns exec` makes one), so that it is gone from
//! the host with the run's last process, whatever happens.
use std::{
    fs,
    os::unix::fs::{MetadataExt as _, PermissionsExt as _},
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};
use rustix::fs::{FallocateFlags, fallocate, statvfs};

use crate::{World, server::Server};

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Nothing reserved for root, so that full is full.
    Ext4,
    /// The one whose log can be cut off: `xfs_io -x -c shutdown`.
    Xfs,
}

/// A mounted file system. Dropping it unmounts nothing.
#[derive(Debug)]
pub struct Disk {
    image: PathBuf,
    mount_point: PathBuf,
}

impl Disk {
    /// The file system that the world's data folder is on; made and mounted on first use, which must be
    /// before the server's first start.
    pub fn of(world: &World, kind: Kind, bytes: u64) -> Result<Self> {
        Self::of_server(&world.server, kind, bytes)
    }

    /// The same for another server than the world's own.
    pub fn of_server(server: &Server, kind: Kind, bytes: u64) -> Result<Self> {
        let disk = Self {
            image: server.dir.join("disk"),
            mount_point: server.data_dir.clone(),
        };
        if disk.image.exists() {
            // A case that failed with the power off is not the next one's fault.
            if !disk.mounted()? {
                disk.mount()?;
            }
            return Ok(disk);
        }
        ensure!(
            !disk.mount_point.exists(),
            "{} has been used already",
            disk.mount_point.display()
        );
        fs::create_dir(&disk.mount_point)?;
        fs::File::create(&disk.image)?.set_len(bytes)?;
        let mut make = match kind {
            Kind::Ext4 => Command::new("mke2fs"),
            Kind::Xfs => Command::new("mkfs.xfs"),
        };
        match kind {
            Kind::Ext4 => make.args(["-q", "-F", "-t", "ext4", "-m", "0"]),
            Kind::Xfs => make.arg("-q"),
        };
        run(make.arg(&disk.image))?;
        disk.mount()?;
        fs::set_permissions(&disk.mount_point, fs::Permissions::from_mode(0o700))?;
        Ok(disk)
    }

    fn mounted(&self) -> Result<bool> {
        let parent = self.mount_point.parent().unwrap_or(Path::new("/"));
        Ok(fs::metadata(&self.mount_point)?.dev() != fs::metadata(parent)?.dev())
    }

    fn mount(&self) -> Result<()> {
        run(Command::new("mount")
            .args(["-o", "loop"])
            .arg(&self.image)
            .arg(&self.mount_point))
    }

    /// Nothing reaches the disk any more, and what the log has not written yet never will
    /// (`XFS_FSOP_GOING_FLAGS_NOLOGFLUSH`, which is what xfs_io's shutdown does without `-f`).
    pub fn cut_power(&self) -> Result<()> {
        run(Command::new("xfs_io")
            .args(["-x", "-c", "shutdown"])
            .arg(&self.mount_point))
    }

    /// Power is back: the log is recovered. Nobody may use the file system.
    pub async fn restore_power(&self) -> Result<()> {
        // A killed process lets go of its files a moment after it has vanished from sight.
        let mut last = Ok(());
        for _ in 0..100 {
            last = run(Command::new("umount").arg(&self.mount_point));
            if last.is_ok() {
                return self.mount();
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        last
    }

    /// Nobody may use the file system any more.
    pub fn unmount(&self) -> Result<()> {
        run(Command::new("umount").arg(&self.mount_point))
    }

    /// Bytes that can be written.
    pub fn available(&self) -> Result<u64> {
        let stat = statvfs(&self.mount_point)?;
        Ok(stat.f_bavail * stat.f_frsize)
    }

    /// Uses the file system up, except for about `left` bytes, until the answer is dropped.
    pub fn fill(&self, left: u64) -> Result<Filler> {
        let path = self.mount_point.join("filler");
        let file = fs::File::create(&path)?;
        let filler = Filler(path);
        // The blocks that describe the filler come out of the same space: nearer in a few steps.
        let mut at = 0;
        for _ in 0..16 {
            let excess = self.available()?.saturating_sub(left);
            if excess < 64 << 10 {
                break;
            }
            let step = if excess > 1 << 20 {
                excess - (excess >> 6)
            } else {
                excess / 2
            };
            fallocate(&file, FallocateFlags::empty(), at, step).context("fill the disk")?;
            at += step;
        }
        let available = self.available()?;
        ensure!(
            available <= left + (256 << 10),
            "{available} bytes are left, wanted {left}"
        );
        Ok(filler)
    }
}

/// What fills a disk.
#[derive(Debug)]
pub struct Filler(PathBuf);

impl Drop for Filler {
    fn drop(&mut self) {
        // A case that goes on with a full disk says so itself.
        let _reported_by_what_follows = fs::remove_file(&self.0);
    }
}

fn run(command: &mut Command) -> Result<()> {
    let output = command
        .output()
        .with_context(|| format!("{:?}", command.get_program()))?;
    ensure!(
        output.status.success(),
        "{command:?}: {}: {}",
        output.status,
        String::from_utf8_lossy(&output.stderr).trim()
    );
    Ok(())
}
