//! `user[:group]` against the image's own /etc/passwd and /etc/group.
//!
//! Parsed here because the C library's lookups need shared objects that a static program has not.
use std::{fs, io, path::Path};

/// Identity of a process.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct User {
    pub uid: u32,
    pub gid: u32,
    /// Supplementary groups.
    pub groups: Vec<u32>,
    pub home: String,
}

#[derive(Debug, thiserror::Error)]
pub enum UserError {
    #[error("user: {0:?} is not in the image's /etc/passwd; use a name from there or a number")]
    NoUser(String),
    #[error("group: {0:?} is not in the image's /etc/group; use a name from there or a number")]
    NoGroup(String),
    #[error("{path}: {source}")]
    Io {
        path: &'static str,
        source: io::Error,
    },
}

/// Looks `spec` up below `root` (`/` in a guest). Empty means root. As container runtimes do: numbers
/// need no entry; supplementary groups come from /etc/group unless a group was named.
pub fn resolve(spec: &str, root: &Path) -> Result<User, UserError> {
    let passwd = read(root, "/etc/passwd")?;
    let group = read(root, "/etc/group")?;
    lookup(spec, &passwd, &group)
}

fn read(root: &Path, path: &'static str) -> Result<String, UserError> {
    match fs::read(root.join(path.trim_start_matches('/'))) {
        Ok(bytes) => Ok(String::from_utf8_lossy(&bytes).into_owned()),
        Err(e)
            if matches!(
                e.kind(),
                io::ErrorKind::NotFound | io::ErrorKind::NotADirectory
            ) =>
        {
            Ok(String::new())
        }
        Err(source) => Err(UserError::Io { path, source }),
    }
}

struct Entry<'a> {
    name: &'a str,
    uid: u32,
    gid: u32,
    home: &'a str,
}

fn passwd_entries(passwd: &str) -> impl Iterator<Item = Entry<'_>> {
    passwd.lines().filter_map(|line| {
        let mut fields = line.split(':');
        let name = fields.next()?;
        let uid = fields.nth(1)?.parse().ok()?;
        let gid = fields.next()?.parse().ok()?;
        let home = fields.nth(1).unwrap_or("");
        Some(Entry {
            name,
            uid,
            gid,
            home,
        })
    })
}

/// Name, number and members.
fn group_entries(group: &str) -> impl Iterator<Item = (&str, u32, &str)> {
    group.lines().filter_map(|line| {
        let mut fields = line.split(':');
        Some((
            fields.next()?,
            fields.nth(1)?.parse().ok()?,
            fields.next().unwrap_or(""),
        ))
    })
}

fn lookup(spec: &str, passwd: &str, group: &str) -> Result<User, UserError> {
    let (user, wanted_group) = match spec.split_once(':') {
        Some((user, group)) => (user, Some(group).filter(|g| !g.is_empty())),
        None => (spec, None),
    };
    let user = if user.is_empty() { "0" } else { user };
    let number: Option<u32> = user.parse().ok();
    // A name goes before a number, so that a user called "1000" is found.
    let entry = passwd_entries(passwd)
        .find(|e| e.name == user)
        .or_else(|| passwd_entries(passwd).find(|e| Some(e.uid) == number));
    let (uid, mut gid) = match (&entry, number) {
        (Some(entry), _) => (entry.uid, entry.gid),
        (None, Some(uid)) => (uid, 0),
        (None, None) => return Err(UserError::NoUser(user.to_owned())),
    };
    let mut groups = Vec::new();
    match wanted_group {
        Some(wanted) => {
            gid = group_entries(group)
                .find(|(name, ..)| *name == wanted)
                .map(|(_, gid, _)| gid)
                .or_else(|| wanted.parse().ok())
                .ok_or_else(|| UserError::NoGroup(wanted.to_owned()))?;
        }
        None => {
            if let Some(entry) = &entry {
                let member = |list: &str| list.split(',').any(|m| m.trim() == entry.name);
                groups.extend(
                    group_entries(group)
                        .filter(|(_, _, list)| member(list))
                        .map(|(_, gid, _)| gid),
                );
            }
        }
    }
    let home = entry
        .map(|e| e.home)
        .filter(|h| !h.is_empty())
        .unwrap_or("/")
        .to_owned();
    Ok(User {
        uid,
        gid,
        groups,
        home,
    })
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used, reason = "tests")]
mod tests {
    use super::*;

    const PASSWD: &str = "root:x:0:0:root:/root:/bin/sh\n# broken\nweb:x:33:34:web:/srv/web:/bin/false\n77:x:1077:1077::/seven:\nnohome:x:5:6::";
    const GROUP: &str = "root:x:0:\nweb:x:34:\naudio:x:29:joe,web\nvideo:x:44:web\nbad\n";

    fn ids(spec: &str) -> (u32, u32, Vec<u32>, String) {
        let user = lookup(spec, PASSWD, GROUP).unwrap();
        (user.uid, user.gid, user.groups, user.home)
    }

    #[test]
    fn all_forms() {
        assert_eq!(ids(""), (0, 0, vec![], "/root".into()));
        assert_eq!(ids("web"), (33, 34, vec![29, 44], "/srv/web".into()));
        assert_eq!(ids("33"), (33, 34, vec![29, 44], "/srv/web".into()));
        assert_eq!(ids("web:audio"), (33, 29, vec![], "/srv/web".into()));
        assert_eq!(ids("web:1234"), (33, 1234, vec![], "/srv/web".into()));
        assert_eq!(ids("4711"), (4711, 0, vec![], "/".into()));
        assert_eq!(ids("4711:4712"), (4711, 4712, vec![], "/".into()));
        assert_eq!(ids("77"), (1077, 1077, vec![], "/seven".into()));
        assert_eq!(ids("nohome:"), (5, 6, vec![], "/".into()));
    }

    #[test]
    fn unknown_names_are_named() {
        let user = lookup("joe", PASSWD, GROUP).unwrap_err().to_string();
        assert!(
            user.contains("\"joe\"") && user.contains("/etc/passwd"),
            "{user}"
        );
        let group = lookup("web:staff", PASSWD, GROUP).unwrap_err().to_string();
        assert!(
            group.contains("\"staff\"") && group.contains("/etc/group"),
            "{group}"
        );
    }

    #[test]
    fn an_image_without_the_files_still_has_root() {
        let empty = tempfile::tempdir().unwrap();
        let user = resolve("", empty.path()).unwrap();
        assert_eq!((user.uid, user.gid, user.home.as_str()), (0, 0, "/"));
        assert!(matches!(
            resolve("web", empty.path()),
            Err(UserError::NoUser(_))
        ));
    }
}
