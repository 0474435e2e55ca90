//! What QEMU on this host can do: found by asking the binary, remembered while the binary stays the same.
use std::{
    ffi::OsString,
    io,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    process::Stdio,
    time::Duration,
};

use tokio::{process::Command, sync::Mutex, time::timeout};

use super::QemuConfig;
use crate::{Accel, Hypervisor, Probe, VmmError};

const DEFAULT_BINARY: &str = "qemu-system-x86_64";

/// The oldest version that everything here was run on.
const OLDEST: [u32; 2] = [7, 2];

/// `--version` answers in 50 ms; a machine under load takes longer.
const DEADLINE: Duration = Duration::from_secs(20);

const INSTALL: &str = "install QEMU (Debian: apt install qemu-system-x86) or set the path of the binary in the configuration";

/// Answers of one binary, valid while the file stays what it was.
#[derive(Debug, Clone)]
struct Answers {
    binary: BinaryId,
    version: String,
    machines: Vec<String>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
struct BinaryId {
    path: PathBuf,
    dev: u64,
    inode: u64,
    size: u64,
    changed: (i64, i64),
}

/// Asks and remembers.
#[derive(Debug)]
pub(super) struct Prober {
    kind: Hypervisor,
    config: QemuConfig,
    known: Mutex<Option<Answers>>,
}

impl Prober {
    pub fn new(kind: Hypervisor, config: QemuConfig) -> Self {
        Self {
            kind,
            config,
            known: Mutex::new(None),
        }
    }

    /// The acceleration new machines get, and why it cannot work, if it cannot.
    fn accel(&self) -> (Accel, Option<String>) {
        match (self.config.accel, doze_host::virt::kvm_usable()) {
            (Some(Accel::Tcg), _) | (None, Err(_)) => (Accel::Tcg, None),
            (Some(Accel::Kvm) | None, Ok(())) => (Accel::Kvm, None),
            (Some(Accel::Kvm), Err(why)) => (
                Accel::Kvm,
                Some(format!(
                    "KVM is configured but not usable: {why}; or configure accel = \"tcg\""
                )),
            ),
        }
    }

    pub async fn probe(&self) -> Probe {
        let (accel, no_accel) = self.accel();
        match self.answers().await {
            Ok(answers) => {
                let missing = self.shortcoming(&answers).or(no_accel);
                Probe {
                    version: Some(answers.version),
                    missing,
                    accel,
                }
            }
            Err(e) => Probe {
                version: None,
                missing: Some(with_source(&e)),
                accel,
            },
        }
    }

    fn shortcoming(&self, answers: &Answers) -> Option<String> {
        if !recent_enough(&answers.version) {
            let [major, minor] = OLDEST;
            return Some(format!(
                "{} is version {}, needed is {major}.{minor} or newer; {INSTALL}",
                answers.binary.path.display(),
                answers.version
            ));
        }
        self.pick_machine_type(answers).err().map(|e| e.to_string())
    }

    pub async fn machine_type(&self) -> Result<String, VmmError> {
        self.pick_machine_type(&self.answers().await?)
    }

    /// The binary's version and the machine types it offers.
    pub async fn versions(&self) -> Result<(String, Vec<String>), VmmError> {
        let answers = self.answers().await?;
        Ok((answers.version, answers.machines))
    }

    fn pick_machine_type(&self, answers: &Answers) -> Result<String, VmmError> {
        let picked = match self.kind {
            Hypervisor::QemuMicrovm => answers.machines.iter().find(|name| *name == "microvm"),
            Hypervisor::Qemu => newest_q35(&answers.machines),
            Hypervisor::CloudHypervisor | Hypervisor::Firecracker => None,
        };
        picked.cloned().ok_or_else(|| VmmError::Missing {
            what: format!(
                "{} {} has no machine type for {:?}",
                answers.binary.path.display(),
                answers.version,
                self.kind
            ),
            mend: INSTALL.to_owned(),
        })
    }

    /// The binary to start.
    pub fn binary(&self) -> Result<PathBuf, VmmError> {
        let wanted = self
            .config
            .binary
            .clone()
            .unwrap_or_else(|| DEFAULT_BINARY.into());
        look_up(&wanted, std::env::var_os("PATH")).ok_or_else(|| VmmError::Missing {
            what: format!(
                "{} is not an executable file or not in PATH",
                wanted.display()
            ),
            mend: INSTALL.to_owned(),
        })
    }

    async fn answers(&self) -> Result<Answers, VmmError> {
        let path = self.binary()?;
        let binary = identify(&path).map_err(|source| VmmError::Io {
            context: format!("cannot inspect {}", path.display()),
            source,
        })?;
        let mut known = self.known.lock().await;
        if let Some(answers) = known.as_ref().filter(|known| known.binary == binary) {
            return Ok(answers.clone());
        }
        let version =
            parse_version(&ask(&path, &["--version"]).await?).ok_or_else(|| VmmError::Missing {
                what: format!(
                    "{} --version does not name a version of QEMU",
                    path.display()
                ),
                mend: INSTALL.to_owned(),
            })?;
        let machines = parse_machines(&ask(&path, &["-machine", "help"]).await?);
        let answers = Answers {
            binary,
            version,
            machines,
        };
        *known = Some(answers.clone());
        Ok(answers)
    }
}

/// An error and what caused it, on one line.
fn with_source(error: &VmmError) -> String {
    match std::error::Error::source(error) {
        Some(source) => format!("{error}: {source}"),
        None => error.to_string(),
    }
}

fn identify(path: &Path) -> io::Result<BinaryId> {
    let meta = std::fs::metadata(path)?;
    Ok(BinaryId {
        path: path.to_owned(),
        dev: meta.dev(),
        inode: meta.ino(),
        size: meta.size(),
        changed: (meta.ctime(), meta.ctime_nsec()),
    })
}

/// A path with a folder is taken as it is; a bare name is looked for in `search`.
fn look_up(wanted: &Path, search: Option<OsString>) -> Option<PathBuf> {
    if wanted.components().count() > 1 {
        return is_executable(wanted).then(|| wanted.to_owned());
    }
    std::env::split_paths(&search?)
        .filter(|dir| dir.is_absolute())
        .map(|dir| dir.join(wanted))
        .find(|path| is_executable(path))
}

fn is_executable(path: &Path) -> bool {
    std::fs::metadata(path).is_ok_and(|meta| meta.is_file() && meta.mode() & 0o111 != 0)
}

async fn ask(binary: &Path, args: &[&str]) -> Result<String, VmmError> {
    let shown = || format!("{} {}", binary.display(), args.join(" "));
    let output = Command::new(binary)
        .args(args)
        .stdin(Stdio::null())
        .kill_on_drop(true)
        .output();
    let output = timeout(DEADLINE, output)
        .await
        .map_err(|_| VmmError::Timeout {
            command: "asking the binary",
            seconds: DEADLINE.as_secs(),
        })?
        .map_err(|source| VmmError::Io {
            context: format!("cannot run {}", shown()),
            source,
        })?;
    if !output.status.success() {
        return Err(VmmError::Missing {
            what: format!(
                "{} failed ({}): {}",
                shown(),
                output.status,
                String::from_utf8_lossy(&output.stderr).trim()
            ),
            mend: INSTALL.to_owned(),
        });
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// `QEMU emulator version 7.2.22 (Debian 1:7.2+...)`.
fn parse_version(text: &str) -> Option<String> {
    let (_, rest) = text.split_once("QEMU emulator version ")?;
    let version = rest.split_whitespace().next()?;
    numbers(version)?;
    Some(version.to_owned())
}

/// The leading dotted numbers; a suffix such as `-rc1` ends them.
pub(super) fn numbers(version: &str) -> Option<Vec<u32>> {
    let digits = version
        .split(|c: char| !(c.is_ascii_digit() || c == '.'))
        .next()?;
    digits.split('.').map(|part| part.parse().ok()).collect()
}

fn recent_enough(version: &str) -> bool {
    numbers(version).is_some_and(|numbers| numbers.as_slice() >= OLDEST.as_slice())
}

/// First words of `-machine help`, after its heading.
fn parse_machines(text: &str) -> Vec<String> {
    text.lines()
        .skip(1)
        .filter_map(|line| line.split_whitespace().next())
        .map(str::to_owned)
        .collect()
}

/// By number: 10.0 is newer than 9.2.
fn newest_q35(machines: &[String]) -> Option<&String> {
    machines
        .iter()
        .filter_map(|name| Some((numbers(name.strip_prefix("pc-q35-")?)?, name)))
        .max()
        .map(|(_, name)| name)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, reason = "tests")]
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn versions_are_numbers_not_strings() {
        let debian = "QEMU emulator version 7.2.22 (Debian 1:7.2+dfsg-7)\nCopyright (c) 2003\n";
        assert_eq!(parse_version(debian).unwrap(), "7.2.22");
        let candidate = "QEMU emulator version 10.1.0-rc2 (v10.1.0-rc2)\n";
        assert_eq!(parse_version(candidate).unwrap(), "10.1.0-rc2");
        assert!(parse_version("qemu-img version 7.2\n").is_none());
        assert!(parse_version("QEMU emulator version unknown\n").is_none());
        assert!(recent_enough("7.2") && recent_enough("7.2.22") && recent_enough("10.1.0-rc2"));
        assert!(!recent_enough("7.1.9") && !recent_enough("6.2.0"));
    }

    #[test]
    fn the_newest_versioned_board_is_picked() {
        let help = "Supported machines are:\n\
                    microvm              microvm (i386)\n\
                    q35                  Standard PC (alias of pc-q35-10.0)\n\
                    pc-q35-9.2           Standard PC\n\
                    pc-q35-10.0          Standard PC\n\
                    pc-q35-2.12          Standard PC\n\
                    pc-i440fx-11.0       Standard PC\n";
        let machines = parse_machines(help);
        assert_eq!(newest_q35(&machines).unwrap(), "pc-q35-10.0");
        assert_eq!(newest_q35(&["q35".to_owned()]), None);
    }

    #[test]
    fn lookup_wants_an_executable_file() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("qemu");
        let search = Some(dir.path().as_os_str().to_owned());
        assert_eq!(look_up(Path::new("qemu"), search.clone()), None);
        std::fs::write(&path, "").unwrap();
        assert_eq!(look_up(Path::new("qemu"), search.clone()), None);
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).unwrap();
        assert_eq!(look_up(Path::new("qemu"), search), Some(path.clone()));
        assert_eq!(look_up(&path, None), Some(path));
        assert_eq!(look_up(Path::new("qemu"), None), None);
    }

    fn configured(binary: PathBuf, accel: Option<Accel>) -> Prober {
        Prober::new(
            Hypervisor::Qemu,
            QemuConfig {
                binary: Some(binary),
                accel,
                run_as: None,
            },
        )
    }

    fn script(dir: &Path, body: &str) -> PathBuf {
        let path = dir.join("fake-qemu");
        // Written by another process: a fork of a test beside us could hold our descriptor open for
        // writing, and exec would answer ETXTBSY.
        let stage = dir.join("stage");
        std::fs::write(&stage, format!("#!/bin/sh\n{body}\n")).unwrap();
        let install = std::process::Command::new("install")
            .args(["-m", "755"])
            .args([&stage, &path])
            .status()
            .unwrap();
        assert!(install.success());
        path
    }

    #[tokio::test]
    async fn a_missing_binary_says_how_to_mend_it() {
        let prober = configured("/nonexistent/qemu".into(), Some(Accel::Tcg));
        let probe = prober.probe().await;
        let missing = probe.missing.unwrap();
        assert!(
            missing.contains("/nonexistent/qemu") && missing.contains("apt install"),
            "{missing}"
        );
        assert!(matches!(
            prober.machine_type().await,
            Err(VmmError::Missing { .. })
        ));
    }

    #[tokio::test]
    async fn answers_are_asked_again_when_the_binary_changes() {
        let dir = tempfile::tempdir().unwrap();
        let fake = |version: &str| {
            script(
                dir.path(),
                &format!(
                    "echo asked >> {}/count\n\
                     case $1 in --version) echo QEMU emulator version {version};; *) echo Supported:; echo pc-q35-{version} x;; esac",
                    dir.path().display()
                ),
            )
        };
        let asked = || {
            std::fs::read_to_string(dir.path().join("count"))
                .unwrap()
                .lines()
                .count()
        };
        let prober = configured(fake("8.1"), Some(Accel::Tcg));
        assert_eq!(prober.machine_type().await.unwrap(), "pc-q35-8.1");
        let probe = prober.probe().await;
        assert_eq!(
            (probe.version.as_deref(), probe.missing),
            (Some("8.1"), None)
        );
        assert_eq!(asked(), 2);
        fake("6.0");
        let probe = prober.probe().await;
        assert!(probe.missing.unwrap().contains("6.0, needed is 7.2"));
        assert_eq!(asked(), 4);
    }

    #[tokio::test]
    async fn a_failing_binary_is_reported_with_its_words() {
        let dir = tempfile::tempdir().unwrap();
        let prober = configured(
            script(dir.path(), "echo broken library >&2; exit 127"),
            None,
        );
        let missing = prober.probe().await.missing.unwrap();
        assert!(missing.contains("broken library"), "{missing}");
    }
}
