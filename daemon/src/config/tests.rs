#![allow(clippy::unwrap_used, clippy::expect_used, reason = "tests")]
use doze_engine::{Algorithm, Compression};

use super::*;

const EXAMPLE: &str = include_str!("../../../doze.example.toml");

fn parse(text: &str, variables: &[(&str, &str)]) -> Result<Config, ConfigErrors> {
    Config::parse(
        Some((Path::new("doze.toml"), text)),
        variables
            .iter()
            .map(|(name, text)| ((*name).to_owned(), (*text).to_owned())),
    )
}

fn reasons(result: Result<Config, ConfigErrors>) -> Vec<(String, String)> {
    result
        .expect_err("this configuration must be refused")
        .0
        .into_iter()
        .map(|error| (error.key, error.reason))
        .collect()
}

fn keys() -> Vec<&'static str> {
    let mut reader = Reader::default();
    sections::read(&mut reader);
    reader.known().to_vec()
}

#[test]
fn nothing_configured_is_the_documented_default() {
    let config = Config::parse(None, []).unwrap();
    assert_eq!(config.data_dir, Path::new("/var/lib/doze"));
    assert_eq!(config.listen.to_string(), "127.0.0.1:4973");
    assert_eq!(config.hypervisor.default, Hypervisor::QemuMicrovm);
    assert_eq!(config.network.gateway, Ipv4Addr::new(10, 77, 0, 1));
    assert_eq!(config.limits.default_memory, 1 << 30);
    assert_eq!(config.warnings(), Vec::<String>::new());
}

#[test]
fn the_example_file_holds_the_defaults() {
    assert_eq!(
        parse(EXAMPLE, &[]).unwrap(),
        Config::parse(None, []).unwrap()
    );
}

#[test]
fn the_example_file_names_every_key_with_a_value_that_is_right() {
    // A commented-out key is `# key = value`; text has no `=` right after its first word.
    let active: String = EXAMPLE
        .lines()
        .map(|line| {
            let candidate = line.strip_prefix("# ").unwrap_or(line);
            let mut words = candidate.split_whitespace();
            match (words.next(), words.next()) {
                (Some(_), Some("=")) => format!("{candidate}\n"),
                _ => format!("{line}\n"),
            }
        })
        .collect();
    parse(&active, &[]).unwrap();
    let table: toml::Table = active.parse().unwrap();
    for key in keys() {
        let (first, rest) = key.split_once('.').unwrap_or((key, ""));
        let rest = rest.split('.').filter(|part| !part.is_empty());
        let found = rest.fold(table.get(first), |found, part| found?.get(part));
        assert!(found.is_some(), "doze.example.toml lacks {key}");
    }
}

#[test]
fn the_servers_compression_is_checked_when_it_is_read() {
    let section = |text: &str| format!("[snapshot.compression_default]\n{text}");
    let read = |text: &str| {
        let config = parse(&section(text), &[]).unwrap();
        config.snapshot.compression_default
    };
    let on = |algorithm, level| {
        let codec = doze_engine::Codec::new(algorithm, Some(level)).unwrap();
        Some(Compression::On(codec))
    };
    assert_eq!(read(""), None);
    assert_eq!(read("enabled = true"), on(Algorithm::Zstd, 1));
    let text = "enabled = true\nalgorithm = \"LZ4\"\nlevel = 9";
    assert_eq!(read(text), on(Algorithm::Lz4, 9));
    // What is off is off, whatever else it says.
    let text = "enabled = false\nalgorithm = \"brotli\"\nlevel = 77";
    assert_eq!(read(text), Some(Compression::Off));
    let variables = [
        ("DOZE_SNAPSHOT__COMPRESSION_DEFAULT__ENABLED", "true"),
        ("DOZE_SNAPSHOT__COMPRESSION_DEFAULT__ALGORITHM", "Zstd"),
        ("DOZE_SNAPSHOT__COMPRESSION_DEFAULT__LEVEL", "19"),
    ];
    let config = parse("", &variables).unwrap();
    assert_eq!(config.snapshot.compression_default, on(Algorithm::Zstd, 19));
    for (text, key, says) in [
        ("enabled = true\nlevel = 20", "level", "1 to 19"),
        (
            "enabled = true\nalgorithm = \"lz4\"\nlevel = 10",
            "level",
            "0 to 9",
        ),
        (
            "enabled = true\nalgorithm = \"gzip\"",
            "algorithm",
            "zstd, lz4",
        ),
        ("enabled = \"yes\"", "enabled", ""),
        ("algorithm = \"lz4\"", "enabled", "missing"),
    ] {
        let errors = parse(&section(text), &[]).unwrap_err().to_string();
        let key = format!("snapshot.compression_default.{key}");
        assert!(errors.contains(&key) && errors.contains(says), "{errors}");
    }
}

#[test]
fn every_key_has_a_variable_that_wins() {
    let file = "listen = \"127.0.0.1:1\"\n[hypervisor]\ndefault = \"qemu\"\n";
    let config = parse(
        file,
        &[
            ("DOZE_LISTEN", "127.0.0.1:2"),
            ("DOZE_HYPERVISOR__ACCEL", "tcg"),
            ("DOZE_NETWORK__ENABLED", "false"),
            ("DOZE_NETWORK__DNS", "1.1.1.1, 9.9.9.9"),
            ("DOZE_LIMITS__MAX_INSTANCES", "7"),
            ("DOZE_LIMITS__DEFAULT_MEMORY", "512MB"),
            ("DOZE_LIMITS__STOP_GRACE", "1m30s"),
            ("DOZE_KERNEL__MODULES", "none"),
            ("DOZE_LOG__FORMAT", ""),
            ("DOZE_URL", "http://elsewhere"),
            ("DOZE_E2E_KEEP", "1"),
            ("PATH", "/bin"),
        ],
    )
    .unwrap();
    assert_eq!(config.listen.port(), 2);
    assert_eq!(config.hypervisor.default, Hypervisor::Qemu);
    assert_eq!(config.hypervisor.accel, Some(Accel::Tcg));
    assert!(!config.network.enabled);
    assert_eq!(
        config.network.dns,
        Some(vec![Ipv4Addr::new(1, 1, 1, 1), Ipv4Addr::new(9, 9, 9, 9)])
    );
    assert_eq!(config.limits.max_instances, 7);
    assert_eq!(config.limits.default_memory, 512 << 20);
    assert_eq!(config.limits.stop_grace, Duration::from_secs(90));
    assert_eq!(config.kernel.modules, None);
    assert_eq!(config.log.format, LogFormat::Text);
}

#[test]
fn all_mistakes_are_reported_at_once() {
    let file = r#"
        data_dir = "relative"
        lissten = "x"
        [hypervisor]
        default = "xen"
        [network]
        gateway = "10.0.0.1"
        bridge = "a bridge"
        [limits]
        default_vcpus = 99
        default_memory = "1.3MB"
        stop_grace = "10"
        [auth]
        jwt_secret = ""
        [log]
        level = "doze=loud"
        [nonsense]
        x = 1
    "#;
    let found = reasons(parse(file, &[("DOZE_NETWORK__SUBNET", "10.1.2.3/16")]));
    let keys: Vec<_> = found.iter().map(|(key, _)| key.as_str()).collect();
    for key in [
        "data_dir",
        "lissten",
        "hypervisor.default",
        "network.gateway",
        "network.bridge",
        "network.subnet",
        "limits.default_vcpus",
        "limits.default_memory",
        "limits.stop_grace",
        "auth.jwt_secret",
        "log.level",
        "nonsense.x",
    ] {
        assert!(keys.contains(&key), "{key} not in {found:?}");
    }
    assert_eq!(found.len(), 12, "{found:?}");
    let reason = |key: &str| &found.iter().find(|(k, _)| k == key).unwrap().1;
    assert!(reason("lissten").contains("did you mean listen?"));
    assert!(reason("network.subnet").contains("DOZE_NETWORK__SUBNET"));
    assert!(reason("hypervisor.default").contains("qemu, qemu-microvm"));
}

#[test]
fn an_unknown_variable_is_a_warning_that_names_it() {
    // What Kubernetes adds for a service called doze.
    let injected = [
        ("DOZE_SERVICE_HOST", "10.0.0.1"),
        ("DOZE_PORT_4973_TCP", "tcp://10.0.0.1:4973"),
        ("DOZE_KERNEL__IMAG", "/boot/secret"),
        ("DOZE_KERNEL_IMAGE", "/boot/secret"),
    ];
    let config = parse("", &injected).unwrap();
    let warnings = config.warnings();
    assert_eq!(warnings.len(), injected.len(), "{warnings:?}");
    let warning = |name: &str| {
        let start = format!("{name}: ");
        let found = warnings.iter().find(|text| text.starts_with(&start));
        found.unwrap_or_else(|| panic!("{name} not in {warnings:?}"))
    };
    assert!(!warning("DOZE_SERVICE_HOST").contains("did you mean"));
    assert!(!warning("DOZE_PORT_4973_TCP").contains("did you mean"));
    for near in ["DOZE_KERNEL__IMAG", "DOZE_KERNEL_IMAGE"] {
        let text = warning(near);
        assert!(text.contains("did you mean DOZE_KERNEL__IMAGE?"), "{text}");
        // The value may be a secret.
        assert!(!text.contains("secret"), "{text}");
    }
    // It does not hide the file's unknown key, and a bad value stays a mistake.
    let found = reasons(parse(
        "service_host = 1",
        &[("DOZE_SERVICE_HOST", "x"), ("DOZE_LISTEN", "nowhere")],
    ));
    let keys: Vec<_> = found.iter().map(|(key, _)| key.as_str()).collect();
    assert_eq!(keys, ["listen", "service_host"]);
}

#[test]
fn a_file_that_is_no_toml_names_its_line() {
    let found = reasons(parse("listen = \n", &[]));
    assert_eq!(found[0].0, "doze.toml");
    assert!(found[0].1.contains("line 1"), "{found:?}");
}

#[test]
fn types_are_strict_in_the_file() {
    let found = reasons(parse("listen = 4973\n[network]\nenabled = \"true\"\n", &[]));
    assert_eq!(found.len(), 2, "{found:?}");
}

#[test]
fn a_secret_never_shows() {
    let text = format!("[auth]\njwt_secret = \"{}\"\n", "hush".repeat(8));
    let config = parse(&text, &[]).unwrap();
    assert!(!format!("{config:?}").contains("hush"));
}

#[test]
fn a_short_secret_is_refused_without_showing_it() {
    let short = "hush-hush-hush-hush-hush-hush-h";
    assert_eq!(short.len(), Secret::MIN_BYTES - 1);
    for (file, variables) in [
        (format!("[auth]\njwt_secret = \"{short}\"\n"), vec![]),
        (String::new(), vec![("DOZE_AUTH__JWT_SECRET", short)]),
    ] {
        let errors = parse(&file, &variables).unwrap_err().to_string();
        assert!(errors.contains("auth.jwt_secret"), "{errors}");
        assert!(
            errors.contains("31 bytes") && errors.contains("at least 32"),
            "{errors}"
        );
        assert!(!errors.contains("hush"), "{errors}");
    }
}

#[test]
fn listening_to_the_world_is_warned_about() {
    let config = parse("listen = \"0.0.0.0:80\"", &[]).unwrap();
    assert!(config.warnings()[0].contains("plain HTTP"));
}

#[test]
fn two_bridges_have_two_tables() {
    let config = parse("[network]\nbridge = \"doze-b1\"\n", &[]).unwrap();
    assert_eq!(config.network.table, "doze-doze-b1");
}
