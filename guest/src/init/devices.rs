//! Kernel modules and disks.
use std::{
    fs::{self, File},
    io::{self, Read},
    path::{Path, PathBuf},
    time::Duration,
};

use doze_agent::config::{self, GuestConfig};
use rustix::io::Errno;

use super::{BootError, console, uevent::Uevents};

const MODULES: &str = "/modules";
const BLOCK_CLASS: &str = "/sys/block";
/// A disk that has not shown up by then will not come.
const DISK_WITHIN: Duration = Duration::from_secs(10);

/// Loads /modules/*.ko in order of their names.
pub(super) fn load_modules() -> Result<(), BootError> {
    let entries = match fs::read_dir(MODULES) {
        Ok(entries) => entries,
        // A kernel with everything built in.
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(e) => return Err(BootError::io(MODULES, e)),
    };
    let mut modules: Vec<PathBuf> = entries.flatten().map(|e| e.path()).collect();
    modules.retain(|p| p.extension().is_some_and(|e| e == "ko"));
    modules.sort();
    for module in modules {
        console::timed(module.display(), || load(&module))?;
    }
    Ok(())
}

fn load(module: &Path) -> Result<(), BootError> {
    let file = File::open(module).map_err(|e| BootError::io(module.display(), e))?;
    match rustix::system::finit_module(&file, c"", 0) {
        // Loaded or built in already; or for hardware this machine does not have.
        Ok(()) | Err(Errno::EXIST | Errno::NODEV) => Ok(()),
        Err(e) => Err(BootError::io(module.display(), e.into())),
    }
}

/// The three disks of a guest.
#[derive(Debug)]
pub(super) struct Disks {
    pub rootfs: PathBuf,
    pub overlay: PathBuf,
    pub config: PathBuf,
}

impl Disks {
    /// Finds them by serial, waiting for those that are still to come.
    pub(super) async fn find() -> Result<Self, BootError> {
        let mut events = Uevents::open().map_err(|e| BootError::io("device events", e))?;
        let mut missing = "";
        let found = async {
            loop {
                match look(Path::new(BLOCK_CLASS)) {
                    Ok(disks) => return Ok(disks),
                    Err(serial) => missing = serial,
                }
                events
                    .changed()
                    .await
                    .map_err(|e| BootError::io("device events", e))?;
            }
        };
        match tokio::time::timeout(DISK_WITHIN, found).await {
            Ok(found) => found,
            Err(_) => Err(BootError::NoDisk {
                serial: missing,
                seconds: DISK_WITHIN.as_secs(),
            }),
        }
    }
}

/// The disks, or the serial of one that is not there.
fn look(class: &Path) -> Result<Disks, &'static str> {
    let mut disks = Vec::new();
    for entry in fs::read_dir(class).into_iter().flatten().flatten() {
        // Not every block device has a serial.
        if let Ok(serial) = fs::read_to_string(entry.path().join("serial")) {
            disks.push((
                serial.trim_end().to_owned(),
                Path::new("/dev").join(entry.file_name()),
            ));
        }
    }
    let find = |serial: &'static str| {
        disks
            .iter()
            .find(|(s, _)| s == serial)
            .map(|(_, path)| path.clone())
            .ok_or(serial)
    };
    Ok(Disks {
        rootfs: find(config::ROOTFS_SERIAL)?,
        overlay: find(config::OVERLAY_SERIAL)?,
        config: find(config::CONFIG_SERIAL)?,
    })
}

/// Reads and checks the configuration.
pub(super) fn read_config(disk: &Path) -> Result<GuestConfig, BootError> {
    let io = |e| BootError::io(disk.display(), e);
    let mut file = File::open(disk).map_err(io)?;
    let mut bytes = vec![0; 4096];
    file.read_exact(&mut bytes).map_err(io)?;
    let total = config::HEADER_LEN + config::json_len(&bytes)?;
    if total > bytes.len() {
        let have = bytes.len();
        bytes.resize(total, 0);
        file.read_exact(&mut bytes[have..]).map_err(io)?;
    }
    Ok(config::decode(&bytes)?)
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used, reason = "tests")]
mod tests {
    use super::*;

    #[test]
    fn disks_are_told_apart_by_serial_and_the_missing_one_is_named() {
        let class = tempfile::tempdir().unwrap();
        let add = |name: &str, serial: Option<&str>| {
            let dir = class.path().join(name);
            fs::create_dir(&dir).unwrap();
            if let Some(serial) = serial {
                fs::write(dir.join("serial"), serial).unwrap();
            }
        };
        add("loop0", None);
        add("vdb", Some("doze-rootfs\n"));
        add("vda", Some("doze-config"));
        assert_eq!(look(class.path()).unwrap_err(), "doze-overlay");
        add("vdc", Some("doze-overlay"));
        let disks = look(class.path()).unwrap();
        assert_eq!(disks.rootfs, Path::new("/dev/vdb"));
        assert_eq!(disks.config, Path::new("/dev/vda"));
    }

    #[test]
    fn a_configuration_longer_than_a_block_is_read_whole() {
        let config = GuestConfig {
            version: 1,
            instance_id: "i".into(),
            hostname: "h".into(),
            argv: vec!["x".repeat(9000)],
            env: Vec::new(),
            working_dir: "/".into(),
            user: String::new(),
            stop_signal: "SIGTERM".into(),
            network: None,
            skip_guest_agent: true,
        };
        let disk = tempfile::NamedTempFile::new().unwrap();
        fs::write(disk.path(), config::encode(&config).unwrap()).unwrap();
        assert_eq!(read_config(disk.path()).unwrap(), config);
        fs::write(disk.path(), [0; 8192]).unwrap();
        assert!(
            read_config(disk.path())
                .unwrap_err()
                .to_string()
                .contains("DOZECFG1")
        );
    }
}
