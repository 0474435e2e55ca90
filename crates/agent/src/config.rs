//! What the guest's init is told at boot: JSON on the config disk.
//!
//! Disk layout: `DOZECFG1` (8 bytes), length of the JSON (u32 LE), its CRC-32 (u32 LE), the JSON,
//! zeros up to a multiple of 4096 bytes. At most [`MAX_JSON`] bytes of JSON.
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

pub const MAX_JSON: usize = 1 << 20;
/// `virtio-serial` port names, visible in the guest under /sys/class/virtio-ports/*/name.
pub const CONTROL_PORT: &str = "doze.agent.0";
/// Receives the program's stdout and stderr.
pub const APP_LOG_PORT: &str = "doze.app.0";
/// Disk serials, visible in the guest under /sys/block/*/serial.
pub const ROOTFS_SERIAL: &str = "doze-rootfs";
pub const OVERLAY_SERIAL: &str = "doze-overlay";
pub const CONFIG_SERIAL: &str = "doze-config";
/// A line init writes to the serial console when the program ended, as fallback when the channel is
/// not connected: this prefix, then JSON of [`crate::message::ProgramExit`].
pub const EXIT_MARKER: &str = "doze-init: program-exit ";

/// The only version of the configuration there is.
pub const VERSION: u32 = 1;
const MAGIC: &[u8; 8] = b"DOZECFG1";
/// Bytes before the JSON.
pub const HEADER_LEN: usize = 16;
const BLOCK: usize = 4096;

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct GuestConfig {
    /// 1.
    pub version: u32,
    pub instance_id: String,
    pub hostname: String,
    /// Entrypoint and command joined; not empty.
    pub argv: Vec<String>,
    /// `KEY=VALUE`, image's first, the request's override by key. Entries of another form are ignored.
    pub env: Vec<String>,
    /// Absolute; `/` when the image says nothing. Created when absent, as container runtimes do.
    pub working_dir: String,
    /// `user[:group]`; empty means root.
    pub user: String,
    /// Signal name that asks the program to end, for example `SIGTERM`.
    pub stop_signal: String,
    pub network: Option<GuestNetwork>,
    /// Lifecycle reports and shutdown stay; exec and file access are refused.
    pub skip_guest_agent: bool,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct GuestNetwork {
    pub mac: String,
    /// `10.77.0.5`
    pub address: std::net::Ipv4Addr,
    pub prefix: u8,
    pub gateway: std::net::Ipv4Addr,
    /// Name servers for /etc/resolv.conf.
    pub dns: Vec<std::net::Ipv4Addr>,
}

impl GuestNetwork {
    /// # Errors
    /// A value no guest can act on, by its field.
    pub fn check(&self) -> Result<(), ConfigError> {
        if self.mac_bytes().is_none() {
            let allowed = "six bytes in hexadecimal with colons, of one station";
            return Err(invalid("network.mac", &self.mac, allowed));
        }
        self.check_prefix()
    }

    fn check_prefix(&self) -> Result<(), ConfigError> {
        if (1..=32).contains(&self.prefix) {
            return Ok(());
        }
        Err(invalid(
            "network.prefix",
            &self.prefix.to_string(),
            "1 to 32",
        ))
    }

    /// The address of one station (neither a group's nor all zeros), or `None` if it is none.
    pub fn mac_bytes(&self) -> Option<[u8; 6]> {
        let mut bytes = [0; 6];
        let mut parts = self.mac.split(':');
        for byte in &mut bytes {
            // Not `from_str_radix`, which also takes a sign.
            hex::decode_to_slice(parts.next()?, std::slice::from_mut(byte)).ok()?;
        }
        let station = bytes[0] & 1 == 0 && bytes != [0; 6];
        (parts.next().is_none() && station).then_some(bytes)
    }
}

/// The machine-id(5) of an instance: its own, and the same at every boot.
pub fn machine_id(instance_id: &str) -> String {
    let hash = Sha256::new()
        .chain_update("doze-machine-id:")
        .chain_update(instance_id)
        .finalize();
    hex::encode(&hash[..16])
}

/// Why a config disk, or an identity, was not accepted.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The bytes are not what [`encode`] writes.
    #[error("config disk: {0}")]
    Malformed(String),
    /// A value no guest can act on.
    #[error("config: {field}: {value:?} is not allowed; allowed: {allowed}")]
    Invalid {
        field: &'static str,
        value: String,
        allowed: &'static str,
    },
}

/// The whole disk, a multiple of 4096 bytes.
pub fn encode(config: &GuestConfig) -> Result<Vec<u8>, ConfigError> {
    validate(config)?;
    let json = serde_json::to_vec(config)
        .map_err(|e| ConfigError::Malformed(format!("cannot be written as JSON: {e}")))?;
    if json.len() > MAX_JSON {
        return Err(ConfigError::Malformed(format!(
            "{} bytes of JSON; at most {MAX_JSON}: shorten environment or arguments",
            json.len()
        )));
    }
    let mut disk = Vec::with_capacity((HEADER_LEN + json.len()).next_multiple_of(BLOCK));
    disk.extend_from_slice(MAGIC);
    disk.extend_from_slice(&(json.len() as u32).to_le_bytes());
    disk.extend_from_slice(&crc32fast::hash(&json).to_le_bytes());
    disk.extend_from_slice(&json);
    disk.resize(disk.len().next_multiple_of(BLOCK), 0);
    Ok(disk)
}

/// Reads what [`encode`] wrote; bytes after the JSON are ignored.
pub fn decode(disk: &[u8]) -> Result<GuestConfig, ConfigError> {
    let len = json_len(disk)?;
    let (header, rest) = disk.split_at(HEADER_LEN);
    let json = rest.get(..len).ok_or_else(|| {
        ConfigError::Malformed(format!(
            "{len} bytes of JSON announced, {} there",
            rest.len()
        ))
    })?;
    let crc = u32::from_le_bytes([header[12], header[13], header[14], header[15]]);
    if crc32fast::hash(json) != crc {
        return Err(ConfigError::Malformed(
            "the checksum of the JSON does not match".into(),
        ));
    }
    let config: GuestConfig =
        serde_json::from_slice(json).map_err(|e| ConfigError::Malformed(format!("JSON: {e}")))?;
    validate(&config)?;
    Ok(config)
}

/// Length of the JSON that follows a header, so that a reader needs not read the whole disk.
pub fn json_len(header: &[u8]) -> Result<usize, ConfigError> {
    let Some(header) = header.get(..HEADER_LEN) else {
        return Err(ConfigError::Malformed(format!(
            "{} bytes, shorter than its header",
            header.len()
        )));
    };
    if header[..MAGIC.len()] != MAGIC[..] {
        return Err(ConfigError::Malformed(
            "does not begin with DOZECFG1".into(),
        ));
    }
    let len = u32::from_le_bytes([header[8], header[9], header[10], header[11]]) as usize;
    if len > MAX_JSON {
        return Err(ConfigError::Malformed(format!(
            "{len} bytes of JSON announced; at most {MAX_JSON}"
        )));
    }
    Ok(len)
}

fn validate(config: &GuestConfig) -> Result<(), ConfigError> {
    if config.version != VERSION {
        return Err(invalid("version", &config.version.to_string(), "1"));
    }
    if config.argv.first().is_none_or(String::is_empty) {
        let allowed = "at least a command that is not empty";
        return Err(invalid("argv", "", allowed));
    }
    if let Some(text) = config
        .argv
        .iter()
        .chain(&config.env)
        .find(|s| s.contains('\0'))
    {
        return Err(invalid("argv or env", text, "no NUL character"));
    }
    if !config.working_dir.starts_with('/') || config.working_dir.contains('\0') {
        return Err(invalid(
            "working_dir",
            &config.working_dir,
            "an absolute path",
        ));
    }
    check_hostname(&config.hostname)?;
    let network = config.network.as_ref();
    network.map_or(Ok(()), GuestNetwork::check_prefix)
}

pub(crate) fn check_hostname(hostname: &str) -> Result<(), ConfigError> {
    let characters = hostname
        .bytes()
        .all(|b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'.'));
    if characters && (1..=63).contains(&hostname.len()) {
        return Ok(());
    }
    Err(invalid("hostname", hostname, "1 to 63 of [A-Za-z0-9.-]"))
}

pub(crate) fn check_machine_id(id: &str) -> Result<(), ConfigError> {
    let digits = id
        .bytes()
        .all(|b| b.is_ascii_digit() || matches!(b, b'a'..=b'f'));
    if id.len() == 32 && digits && id.bytes().any(|b| b != b'0') {
        return Ok(());
    }
    let allowed = "32 lower-case hexadecimal digits, not all zero";
    Err(invalid("machine_id", id, allowed))
}

fn invalid(field: &'static str, value: &str, allowed: &'static str) -> ConfigError {
    ConfigError::Invalid {
        field,
        value: value.to_owned(),
        allowed,
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used, reason = "tests")]
mod tests {
    use proptest::{collection::vec, prelude::*};

    use super::*;

    fn config() -> GuestConfig {
        GuestConfig {
            version: 1,
            instance_id: "abc".into(),
            hostname: "web".into(),
            argv: vec!["/bin/sh".into()],
            env: vec!["A=b".into(), "EMPTY=".into()],
            working_dir: "/".into(),
            user: String::new(),
            stop_signal: "SIGTERM".into(),
            network: Some(GuestNetwork {
                mac: "52:54:00:00:00:01".into(),
                address: [10, 77, 0, 5].into(),
                prefix: 24,
                gateway: [10, 77, 0, 1].into(),
                dns: vec![[1, 1, 1, 1].into()],
            }),
            skip_guest_agent: false,
        }
    }

    #[test]
    fn what_is_written_is_read() {
        let disk = encode(&config()).unwrap();
        assert_eq!(disk.len() % 4096, 0);
        assert_eq!(decode(&disk).unwrap(), config());
    }

    #[test]
    fn every_damaged_byte_is_noticed() {
        let disk = encode(&config()).unwrap();
        let used = HEADER_LEN + json_len(&disk).unwrap();
        for at in 0..used {
            let mut bad = disk.clone();
            bad[at] ^= 1;
            assert!(decode(&bad).is_err(), "byte {at}");
        }
        assert!(decode(&disk[..HEADER_LEN + 3]).is_err());
    }

    #[test]
    fn impossible_values_are_refused_with_their_field() {
        type Spoil = fn(&mut GuestConfig);
        let cases: [(&str, Spoil); 7] = [
            ("version", |c| c.version = 2),
            ("argv", |c| c.argv.clear()),
            ("argv", |c| c.argv[0].clear()),
            ("argv or env", |c| c.env.push("A=\0".into())),
            ("working_dir", |c| c.working_dir = "srv".into()),
            ("hostname", |c| c.hostname = "a b".into()),
            ("network.prefix", |c| {
                c.network.as_mut().unwrap().prefix = 33
            }),
        ];
        for (field, spoil) in cases {
            let mut bad = config();
            spoil(&mut bad);
            let message = encode(&bad).unwrap_err().to_string();
            assert!(message.contains(&format!(" {field}: ")), "{message}");
        }
    }

    /// Of an instance that exists it must never become another one.
    #[test]
    fn a_machine_id_follows_from_the_instance() {
        // printf doze-machine-id:abc | sha256sum
        assert_eq!(machine_id("abc"), "475db82914d7a5513288b338570e436e");
        assert_ne!(machine_id("abd"), machine_id("abc"));
        assert!(check_machine_id(&machine_id("")).is_ok());
    }

    #[test]
    fn too_much_is_refused() {
        let mut big = config();
        big.argv.push("x".repeat(MAX_JSON));
        assert!(encode(&big).unwrap_err().to_string().contains("at most"));
    }

    proptest! {
        #[test]
        fn random_disks_never_panic(mut disk in vec(any::<u8>(), 0..9000), magic: bool) {
            if magic && disk.len() >= 8 {
                disk[..8].copy_from_slice(MAGIC);
            }
            let _ = decode(&disk);
        }
    }
}
