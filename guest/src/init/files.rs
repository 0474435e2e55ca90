//! The few files in /etc that belong to the instance and not to its image. They are written into
//! the overlay at every boot, so that a copy of the overlay, or an image that brings its own, makes no two
//! instances the same. A copy that wakes instead of booting gets them by [`rename`].
use std::{fs, io, os::unix::fs::PermissionsExt, path::Path};

use doze_agent::{
    config::{GuestConfig, GuestNetwork, machine_id},
    message::Identity,
};

use super::BootError;

/// Where programs look for a machine-id(5); the second only where the image has it.
const MACHINE_ID: &str = "etc/machine-id";
const DBUS_MACHINE_ID: &str = "var/lib/dbus/machine-id";

/// What of an instance is written to files.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Named {
    pub(super) hostname: String,
    pub(super) network: Option<GuestNetwork>,
}

impl Named {
    pub(super) fn of(config: &GuestConfig) -> Self {
        Self {
            hostname: config.hostname.clone(),
            network: config.network.clone(),
        }
    }

    fn hostname_file(&self) -> String {
        format!("{}\n", self.hostname)
    }

    fn hosts_line(&self) -> String {
        let own = self
            .network
            .as_ref()
            .map_or([127, 0, 1, 1].into(), |n| n.address);
        format!("{own}\t{}\n", self.hostname)
    }

    /// `None`: the image's own stays.
    fn resolv_conf(&self) -> Option<String> {
        let network = self.network.as_ref().filter(|n| !n.dns.is_empty())?;
        let lines = network.dns.iter();
        Some(lines.map(|s| format!("nameserver {s}\n")).collect())
    }
}

pub(super) fn write(config: &GuestConfig) -> Result<(), BootError> {
    set_hostname(&config.hostname)?;
    write_below(Path::new("/"), config).map_err(|e| BootError::io("writing to /etc", e))
}

pub(super) fn set_hostname(hostname: &str) -> Result<(), BootError> {
    rustix::system::sethostname(hostname.as_bytes())
        .map_err(|e| BootError::io("setting the host name", e.into()))
}

fn write_below(root: &Path, config: &GuestConfig) -> io::Result<()> {
    let etc = root.join("etc");
    fs::create_dir_all(&etc)?;
    let named = Named::of(config);
    replace(&etc.join("hostname"), &named.hostname_file())?;
    replace(&etc.join("hosts"), &hosts(&named))?;
    if let Some(lines) = named.resolv_conf() {
        replace(&etc.join("resolv.conf"), &lines)?;
    }
    write_machine_id(root, &machine_id(&config.instance_id))
}

/// Makes the files of a running guest say `now` where they still say what init wrote for `former`; what a
/// program put there instead is left alone. The machine-id is nobody's but ours.
pub(super) fn rename(
    root: &Path,
    former: &Named,
    now: &Named,
    identity: &Identity,
) -> io::Result<()> {
    let etc = root.join("etc");
    fs::create_dir_all(&etc)?;
    write_machine_id(root, &identity.machine_id)?;
    replace(&etc.join("hostname"), &now.hostname_file())?;
    let hosts = etc.join("hosts");
    if let Ok(text) = fs::read_to_string(&hosts) {
        let (old, new) = (former.hosts_line(), now.hosts_line());
        let lines = text.split_inclusive('\n');
        let lines = lines.map(|line| if line == old { &new } else { line });
        replace(&hosts, &lines.collect::<String>())?;
    }
    let resolv_conf = etc.join("resolv.conf");
    if let (Some(old), Some(new)) = (former.resolv_conf(), now.resolv_conf())
        && fs::read_to_string(&resolv_conf).is_ok_and(|text| text == old)
    {
        replace(&resolv_conf, &new)?;
    }
    Ok(())
}

/// Always, whatever is there: an id that came with an image or a copied disk is shared with others, and
/// one that is the instance's own is this one.
fn write_machine_id(root: &Path, id: &str) -> io::Result<()> {
    let line = format!("{id}\n");
    let path = root.join(MACHINE_ID);
    replace(&path, &line)?;
    fs::set_permissions(&path, fs::Permissions::from_mode(0o444))?;
    let dbus = root.join(DBUS_MACHINE_ID);
    // A link leads to the other one.
    if fs::symlink_metadata(&dbus).is_ok_and(|m| m.is_file()) {
        replace(&dbus, &line)?;
    }
    Ok(())
}

fn hosts(named: &Named) -> String {
    format!(
        "127.0.0.1\tlocalhost\n\
         ::1\tlocalhost ip6-localhost ip6-loopback\n\
         fe00::0\tip6-localnet\n\
         ff00::0\tip6-mcastprefix\n\
         ff02::1\tip6-allnodes\n\
         ff02::2\tip6-allrouters\n\
         {}",
        named.hosts_line()
    )
}

/// Replaces a symbolic link itself: it may point to where no file can be.
fn replace(path: &Path, content: &str) -> io::Result<()> {
    let link = fs::symlink_metadata(path).is_ok_and(|m| !m.is_file());
    if !link && fs::read(path).is_ok_and(|old| old == content.as_bytes()) {
        return Ok(());
    }
    if link {
        fs::remove_file(path)?;
    }
    fs::write(path, content)
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used, reason = "tests")]
mod tests {
    use super::*;

    fn config(instance_id: &str) -> GuestConfig {
        GuestConfig {
            version: 1,
            instance_id: instance_id.into(),
            hostname: "web".into(),
            argv: vec!["x".into()],
            env: Vec::new(),
            working_dir: "/".into(),
            user: String::new(),
            stop_signal: String::new(),
            network: Some(GuestNetwork {
                mac: String::new(),
                address: [10, 0, 0, 2].into(),
                prefix: 24,
                gateway: [10, 0, 0, 1].into(),
                dns: vec![[9, 9, 9, 9].into(), [1, 1, 1, 1].into()],
            }),
            skip_guest_agent: false,
        }
    }

    #[test]
    fn a_dangling_link_does_not_swallow_the_name_servers() {
        let root = tempfile::tempdir().unwrap();
        let etc = root.path().join("etc");
        fs::create_dir(&etc).unwrap();
        std::os::unix::fs::symlink("../run/none/resolv.conf", etc.join("resolv.conf")).unwrap();
        fs::write(etc.join("hostname"), "of the image\n").unwrap();
        write_below(root.path(), &config("i")).unwrap();
        let read = |name| fs::read_to_string(etc.join(name)).unwrap();
        assert_eq!(
            read("resolv.conf"),
            "nameserver 9.9.9.9\nnameserver 1.1.1.1\n"
        );
        assert_eq!(read("hostname"), "web\n");
        assert!(read("hosts").ends_with("10.0.0.2\tweb\n"));
        assert!(read("hosts").starts_with("127.0.0.1\tlocalhost\n"));
    }

    /// What an image, or the disk of another instance, may bring.
    #[test]
    fn the_machine_id_is_the_instances_own_whatever_was_there() {
        use std::os::unix::fs::symlink;
        let wanted = format!("{}\n", machine_id("i"));
        type Before = fn(&Path);
        let cases: [Before; 6] = [
            |_| {},
            |root| fs::write(root.join(MACHINE_ID), "").unwrap(),
            |root| fs::write(root.join(MACHINE_ID), "uninitialized\n").unwrap(),
            |root| write_below(root, &config("another")).unwrap(),
            |root| symlink("/nowhere", root.join(MACHINE_ID)).unwrap(),
            |root| {
                fs::create_dir_all(root.join("var/lib/dbus")).unwrap();
                fs::write(root.join(DBUS_MACHINE_ID), "f".repeat(32)).unwrap();
            },
        ];
        for before in cases {
            let root = tempfile::tempdir().unwrap();
            fs::create_dir(root.path().join("etc")).unwrap();
            before(root.path());
            for _boot in 0..2 {
                write_below(root.path(), &config("i")).unwrap();
                let path = root.path().join(MACHINE_ID);
                assert_eq!(fs::read_to_string(&path).unwrap(), wanted);
                assert_eq!(path.metadata().unwrap().permissions().mode() & 0o777, 0o444);
                if let Ok(dbus) = fs::read_to_string(root.path().join(DBUS_MACHINE_ID)) {
                    assert_eq!(dbus, wanted);
                }
            }
        }
    }

    fn fork() -> (Named, Identity) {
        let network = GuestNetwork {
            address: [10, 0, 0, 3].into(),
            dns: vec![[8, 8, 8, 8].into()],
            ..config("i").network.unwrap()
        };
        let identity = Identity {
            hostname: "web-2".into(),
            machine_id: machine_id("fork"),
            network: Some(network.clone()),
        };
        let named = Named {
            hostname: identity.hostname.clone(),
            network: Some(network),
        };
        (named, identity)
    }

    #[test]
    fn a_renamed_guest_keeps_what_its_programs_wrote() {
        let root = tempfile::tempdir().unwrap();
        write_below(root.path(), &config("i")).unwrap();
        let etc = root.path().join("etc");
        let read = |name| fs::read_to_string(etc.join(name)).unwrap();
        let added = format!("10.9.9.9\tdb\n{}10.0.0.2\tweb.example\n", read("hosts"));
        fs::write(etc.join("hosts"), &added).unwrap();
        let (former, (now, identity)) = (Named::of(&config("i")), fork());
        // Whoever was interrupted begins anew.
        for _ in 0..2 {
            rename(root.path(), &former, &now, &identity).unwrap();
            assert_eq!(read("hostname"), "web-2\n");
            let wanted = added.replace("10.0.0.2\tweb\n", "10.0.0.3\tweb-2\n");
            assert_eq!(read("hosts"), wanted);
            assert_eq!(read("resolv.conf"), "nameserver 8.8.8.8\n");
            assert_eq!(read("machine-id"), format!("{}\n", machine_id("fork")));
        }
        fs::write(etc.join("resolv.conf"), "nameserver 127.0.0.53\n").unwrap();
        fs::remove_file(etc.join("hosts")).unwrap();
        rename(root.path(), &now, &former, &identity).unwrap();
        assert_eq!(read("resolv.conf"), "nameserver 127.0.0.53\n");
        assert!(!etc.join("hosts").exists());
    }
}
