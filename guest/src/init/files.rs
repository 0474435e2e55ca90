//! The few files in /etc that belong to the instance and not to its image. They are written into
//! the overlay at every boot.
use std::{fs, io, path::Path};

use doze_agent::config::GuestConfig;

use super::BootError;

pub(super) fn write(config: &GuestConfig) -> Result<(), BootError> {
    rustix::system::sethostname(config.hostname.as_bytes())
        .map_err(|e| BootError::io("setting the host name", e.into()))?;
    write_below(Path::new("/"), config).map_err(|e| BootError::io("writing to /etc", e))
}

fn write_below(root: &Path, config: &GuestConfig) -> io::Result<()> {
    let etc = root.join("etc");
    fs::create_dir_all(&etc)?;
    replace(&etc.join("hostname"), &format!("{}\n", config.hostname))?;
    replace(&etc.join("hosts"), &hosts(config))?;
    if let Some(network) = config.network.as_ref().filter(|n| !n.dns.is_empty()) {
        let lines: String = network
            .dns
            .iter()
            .map(|server| format!("nameserver {server}\n"))
            .collect();
        replace(&etc.join("resolv.conf"), &lines)?;
    }
    Ok(())
}

fn hosts(config: &GuestConfig) -> String {
    let own = config
        .network
        .as_ref()
        .map_or([127, 0, 1, 1].into(), |n| n.address);
    format!(
        "127.0.0.1\tlocalhost\n\
         ::1\tlocalhost ip6-localhost ip6-loopback\n\
         fe00::0\tip6-localnet\n\
         ff00::0\tip6-mcastprefix\n\
         ff02::1\tip6-allnodes\n\
         ff02::2\tip6-allrouters\n\
         {own}\t{}\n",
        config.hostname
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

    #[test]
    fn a_dangling_link_does_not_swallow_the_name_servers() {
        let root = tempfile::tempdir().unwrap();
        let config = GuestConfig {
            version: 1,
            instance_id: "i".into(),
            hostname: "web".into(),
            argv: vec!["x".into()],
            env: Vec::new(),
            working_dir: "/".into(),
            user: String::new(),
            stop_signal: String::new(),
            network: Some(doze_agent::config::GuestNetwork {
                mac: String::new(),
                address: [10, 0, 0, 2].into(),
                prefix: 24,
                gateway: [10, 0, 0, 1].into(),
                dns: vec![[9, 9, 9, 9].into(), [1, 1, 1, 1].into()],
            }),
            skip_guest_agent: false,
        };
        let etc = root.path().join("etc");
        fs::create_dir(&etc).unwrap();
        std::os::unix::fs::symlink("../run/none/resolv.conf", etc.join("resolv.conf")).unwrap();
        fs::write(etc.join("hostname"), "of the image\n").unwrap();
        write_below(root.path(), &config).unwrap();
        let read = |name| fs::read_to_string(etc.join(name)).unwrap();
        assert_eq!(
            read("resolv.conf"),
            "nameserver 9.9.9.9\nnameserver 1.1.1.1\n"
        );
        assert_eq!(read("hostname"), "web\n");
        assert!(read("hosts").ends_with("10.0.0.2\tweb\n"));
        assert!(read("hosts").starts_with("127.0.0.1\tlocalhost\n"));
    }
}
