//! Starting a process the way a container runtime does: found in its own PATH, as its own user,
//! in its own session.
use std::{
    ffi::OsString,
    fs, io,
    os::{
        fd::{AsFd, OwnedFd},
        unix::{fs::PermissionsExt, process::CommandExt},
    },
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use doze_agent::message::ProgramExit;
use rustix::{
    fs::fchown,
    process::{Pid, ioctl_tiocsctty, setsid},
    stdio::stdin,
    thread::{set_thread_groups, set_thread_res_gid, set_thread_res_uid},
};

use crate::users::User;

/// What the standard says when an image has no PATH.
pub const DEFAULT_PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// Environment variables in order, each key once.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Env(Vec<(String, String)>);

impl Env {
    /// Of `KEY=VALUE`; a later one replaces an earlier one, other forms are ignored.
    pub fn parse(entries: &[String]) -> Self {
        let mut env = Self::default();
        for (key, value) in entries.iter().filter_map(|e| e.split_once('=')) {
            env.set(key, value);
        }
        env
    }

    /// Replaces or adds. A key no process could have is ignored.
    pub fn set(&mut self, key: &str, value: &str) {
        if key.is_empty() || key.contains(['=', '\0']) || value.contains('\0') {
            return;
        }
        match self.0.iter_mut().find(|(k, _)| k == key) {
            Some((_, v)) => value.clone_into(v),
            None => self.0.push((key.to_owned(), value.to_owned())),
        }
    }

    pub fn set_default(&mut self, key: &str, value: &str) {
        if self.get(key).is_none() {
            self.set(key, value);
        }
    }

    pub fn get(&self, key: &str) -> Option<&str> {
        self.0
            .iter()
            .find(|(k, _)| k == key)
            .map(|(_, v)| v.as_str())
    }
}

/// Where a process's standard streams go.
#[derive(Debug)]
pub enum Streams {
    /// `None` reads as empty. stdout and stderr share one pipe, which keeps their order.
    Pipes {
        stdin: Option<OwnedFd>,
        output: OwnedFd,
    },
    /// All three, and it becomes the controlling terminal.
    Terminal(OwnedFd),
}

/// A process to start.
#[derive(Debug)]
pub struct Launch<'a> {
    pub argv: &'a [String],
    pub env: &'a Env,
    pub cwd: &'a Path,
    pub user: &'a User,
    pub streams: Streams,
}

/// Why a process did not start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    #[error("command not found: {0}")]
    NotFound(String),
    #[error("permission denied: {0}")]
    Denied(String),
    #[error("working directory {path}: {source}")]
    Cwd { path: PathBuf, source: io::Error },
    #[error("{command} cannot be started: {source}")]
    Other { command: String, source: io::Error },
}

impl StartError {
    /// As a shell would tell it.
    pub fn exit(&self) -> ProgramExit {
        let code = match self {
            Self::NotFound(_) => 127,
            Self::Denied(_) | Self::Cwd { .. } | Self::Other { .. } => 126,
        };
        ProgramExit {
            code,
            message: self.to_string(),
        }
    }
}

/// Starts it as the leader of a new session and process group, so its id names both. Returns after
/// the exec succeeded.
pub fn spawn(launch: Launch<'_>) -> Result<Pid, StartError> {
    let name = launch.argv.first().cloned().unwrap_or_default();
    let program = find(
        &name,
        launch.env.get("PATH").unwrap_or(DEFAULT_PATH),
        launch.cwd,
    )?;
    match fs::metadata(launch.cwd) {
        Ok(found) if found.is_dir() => {}
        Ok(_) => {
            let source = io::ErrorKind::NotADirectory.into();
            return Err(StartError::Cwd {
                path: launch.cwd.to_owned(),
                source,
            });
        }
        Err(source) => {
            return Err(StartError::Cwd {
                path: launch.cwd.to_owned(),
                source,
            });
        }
    }
    let mut command = Command::new(program);
    command.arg0(&name).args(&launch.argv[1..]).env_clear();
    command.envs(launch.env.0.iter().map(|(k, v)| (k, v)));
    let other = |source| StartError::Other {
        command: name.clone(),
        source,
    };
    let terminal = attach(&mut command, launch.streams, launch.user).map_err(other)?;
    in_child(&mut command, launch.user, launch.cwd, terminal);
    let child = command
        .spawn()
        .map_err(|source| match source.raw_os_error() {
            Some(libc::ENOENT) => {
                StartError::NotFound(format!("{name} (its interpreter is missing)"))
            }
            Some(libc::EACCES | libc::EPERM) => StartError::Denied(name.clone()),
            _ => other(source),
        })?;
    Pid::from_raw(child.id().cast_signed()).ok_or_else(|| other(io::ErrorKind::InvalidData.into()))
}

/// Whether the streams are a terminal.
fn attach(command: &mut Command, streams: Streams, user: &User) -> io::Result<bool> {
    // So that the process may open /dev/stdout anew, which many images do by a symbolic link.
    let give = |fd: &OwnedFd| {
        let owner = rustix::fs::Uid::from_raw(user.uid);
        fchown(fd, Some(owner), None)
    };
    match streams {
        Streams::Pipes { stdin, output } => {
            command.stdin(match stdin {
                Some(fd) => {
                    give(&fd)?;
                    Stdio::from(fd)
                }
                None => Stdio::null(),
            });
            give(&output)?;
            command.stderr(output.try_clone()?).stdout(output);
            Ok(false)
        }
        Streams::Terminal(fd) => {
            give(&fd)?;
            command
                .stdin(fd.try_clone()?)
                .stderr(fd.try_clone()?)
                .stdout(fd);
            Ok(true)
        }
    }
}

fn in_child(command: &mut Command, user: &User, cwd: &Path, terminal: bool) {
    let uid = rustix::fs::Uid::from_raw(user.uid);
    let gid = rustix::fs::Gid::from_raw(user.gid);
    let groups: Vec<_> = user
        .groups
        .iter()
        .map(|g| rustix::fs::Gid::from_raw(*g))
        .collect();
    // Made before the fork: the child may not allocate. A path from outside holds no NUL byte here,
    // because its metadata was found.
    let cwd = std::ffi::CString::new(OsString::from(cwd).into_encoded_bytes()).unwrap_or_default();
    // Only root may change identity; the agent's tests run as whoever runs them.
    let identity = rustix::process::geteuid().is_root();
    crate::sys::before_exec(command, move || {
        setsid()?;
        if terminal {
            ioctl_tiocsctty(stdin().as_fd())?;
        }
        // Before giving up root, as a directory may be closed to the user who is to work in it.
        rustix::process::chdir(cwd.as_c_str())?;
        if identity {
            set_thread_groups(&groups)?;
            set_thread_res_gid(gid, gid, gid)?;
            set_thread_res_uid(uid, uid, uid)?;
        }
        Ok(())
    });
}

/// The file that `name` means, as execvp would find it.
fn find(name: &str, path: &str, cwd: &Path) -> Result<PathBuf, StartError> {
    if name.is_empty() || name.contains('\0') {
        return Err(StartError::NotFound(format!("{name:?}")));
    }
    let candidates: Vec<PathBuf> = if name.contains('/') {
        vec![cwd.join(name)]
    } else {
        // An empty element of PATH means the current directory.
        path.split(':')
            .map(|dir| cwd.join(dir).join(name))
            .collect()
    };
    let mut denied = false;
    for candidate in candidates {
        match fs::metadata(&candidate) {
            Ok(found) if found.is_file() && found.permissions().mode() & 0o111 != 0 => {
                return Ok(candidate);
            }
            Ok(_) => denied = true,
            Err(e) => denied |= e.kind() == io::ErrorKind::PermissionDenied,
        }
    }
    Err(if denied {
        StartError::Denied(name.to_owned())
    } else {
        StartError::NotFound(name.to_owned())
    })
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used, reason = "tests")]
mod tests {
    use super::*;

    #[test]
    fn environment_keeps_one_value_per_key() {
        let mut env = Env::parse(&[
            "A=1".into(),
            "B=x=y".into(),
            "A=2".into(),
            "odd".into(),
            "=z".into(),
        ]);
        env.set_default("A", "no");
        env.set_default("C", "3");
        env.set("", "x");
        let expected =
            [("A", "2"), ("B", "x=y"), ("C", "3")].map(|(k, v)| (k.to_owned(), v.to_owned()));
        assert_eq!(env.0, expected);
    }

    #[test]
    fn commands_are_found_like_a_shell_finds_them() {
        let dir = tempfile::tempdir().unwrap();
        let make = |name: &str, mode| {
            let path = dir.path().join(name);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(&path, "#!/bin/sh\n").unwrap();
            fs::set_permissions(&path, fs::Permissions::from_mode(mode)).unwrap();
            path
        };
        let tool = make("bin/tool", 0o755);
        make("sbin/tool", 0o644);
        make("sbin/plain", 0o644);
        let found = |name| find(name, "nothing:sbin:bin", dir.path());
        assert_eq!(found("tool").unwrap(), tool);
        assert_eq!(found("bin/tool").unwrap(), tool);
        assert!(matches!(found("plain"), Err(StartError::Denied(_))));
        assert!(matches!(found("bin"), Err(StartError::NotFound(_))));
        assert!(matches!(found("./bin"), Err(StartError::Denied(_))));
        assert!(matches!(found("missing"), Err(StartError::NotFound(_))));
        assert!(matches!(found("/missing"), Err(StartError::NotFound(_))));
        assert!(matches!(found(""), Err(StartError::NotFound(_))));
        let exit = found("missing").unwrap_err().exit();
        assert_eq!(
            (exit.code, exit.message.as_str()),
            (127, "command not found: missing")
        );
        let exit = found("plain").unwrap_err().exit();
        assert_eq!(
            (exit.code, exit.message.as_str()),
            (126, "permission denied: plain")
        );
    }
}
