#![allow(clippy::unwrap_used, clippy::expect_used, reason = "tests")]
use proptest::prelude::*;

use super::*;

fn cidr(text: &str) -> Cidr {
    text.parse().unwrap()
}

#[test]
fn bits_beyond_the_prefix_are_cleared() {
    for (written, canonical) in [
        ("10.1.2.3/8", "10.0.0.0/8"),
        ("10.1.2.3/32", "10.1.2.3/32"),
        ("1.2.3.4/0", "0.0.0.0/0"),
        ("fd12:3456::1/8", "fd00::/8"),
        ("FD00:0:0::/16", "fd00::/16"),
        ("::1/0", "::/0"),
        ("::ffff:10.1.2.3/104", "10.0.0.0/8"),
        ("::ffff:10.1.2.3/96", "0.0.0.0/0"),
    ] {
        assert_eq!(cidr(written).to_string(), canonical, "{written}");
    }
}

#[test]
fn other_texts_are_refused_with_a_way_to_mend() {
    let error = |text: &str| text.parse::<Cidr>().unwrap_err();
    for text in [
        "",
        "/",
        "x/8",
        "10.0.0/8",
        "10.0.0.0/",
        "10.0.0.0/+8",
        "10.0.0.0/08",
        " 10.0.0.0/8",
    ] {
        assert_eq!(error(text), CidrError::Form(text.into()));
    }
    assert!(error("10.0.0.5").to_string().contains("10.0.0.5/32"));
    assert!(error("::1").to_string().contains("::1/128"));
    assert!(error("10.0.0.0/33").to_string().contains("0 to 32"));
    assert!(error("fd00::/129").to_string().contains("0 to 128"));
    assert!(error("fd00::/1000").to_string().contains("0 to 128"));
}

#[test]
fn families_do_not_mix_except_where_ipv6_holds_ipv4() {
    let v4: IpAddr = "10.1.2.3".parse().unwrap();
    let mapped: IpAddr = "::ffff:10.1.2.3".parse().unwrap();
    assert!(cidr("10.0.0.0/8").contains(v4) && cidr("10.0.0.0/8").contains(mapped));
    assert!(!cidr("0.0.0.0/0").contains("fd00::1".parse().unwrap()));
    assert!(cidr("::/0").contains(v4) && cidr("::/0").contains(mapped));
    assert!(!cidr("fd00::/8").contains(v4));
}

fn enabled() -> PolicyInput {
    PolicyInput {
        enabled: true,
        idle_timeout: Some(Duration::from_secs(300)),
        ..PolicyInput::default()
    }
}

#[test]
fn lists_are_sorted_and_each_element_is_there_once() {
    let texts = [
        "fd00::1/8",
        "10.2.0.0/16",
        "10.9.9.9/8",
        "10.0.0.0/8",
        "9.0.0.0/8",
    ];
    let input = PolicyInput {
        ignore_source_cidrs: texts.map(String::from).to_vec(),
        ignore_destination_ports: vec![443, 22, 443, 65_535, 22],
        ..enabled()
    };
    let Ok(Policy::Enabled(policy)) = input.normalise() else {
        panic!("refused")
    };
    let networks = policy.ignore_source_cidrs.iter().map(Cidr::to_string);
    assert_eq!(
        networks.collect::<Vec<_>>(),
        ["9.0.0.0/8", "10.0.0.0/8", "10.2.0.0/16", "fd00::/8"]
    );
    assert_eq!(policy.ignore_destination_ports, [22, 443, 65_535]);
}

#[test]
fn all_that_is_wrong_is_said_at_once() {
    let input = PolicyInput {
        idle_timeout: None,
        ignore_source_cidrs: vec!["10.0.0.0/8".into(), "10.0.0.5".into(), "x".into()],
        ignore_destination_ports: vec![22, 0],
        max_flow_idle: Some(Duration::ZERO),
        ..enabled()
    };
    let errors = input.clone().normalise().unwrap_err();
    let text: Vec<_> = errors.iter().map(ToString::to_string).collect();
    assert_eq!(errors.len(), 5, "{text:#?}");
    for field in [
        "idle_timeout is required",
        "ignore_source_cidrs[1]",
        "ignore_source_cidrs[2]",
        "ignore_destination_ports[1]",
        "max_flow_idle must be more than 0",
    ] {
        assert!(
            text.iter().any(|line| line.contains(field)),
            "{field}: {text:#?}"
        );
    }
    let disabled = PolicyInput {
        enabled: false,
        ..input
    };
    assert_eq!(disabled.normalise(), Ok(Policy::Disabled));
    let zero = PolicyInput {
        idle_timeout: Some(Duration::ZERO),
        ..enabled()
    };
    assert_eq!(
        zero.normalise(),
        Err(vec![PolicyError::NotPositive("idle_timeout")])
    );
}

fn any_cidr() -> impl Strategy<Value = (IpAddr, u8)> {
    prop_oneof![
        (any::<u32>(), 0_u8..=32).prop_map(|(a, p)| (Ipv4Addr::from(a).into(), p)),
        (any::<u128>(), 0_u8..=128).prop_map(|(a, p)| (Ipv6Addr::from(a).into(), p)),
        (any::<u32>(), 0_u8..=128)
            .prop_map(|(a, p)| (Ipv4Addr::from(a).to_ipv6_mapped().into(), p)),
    ]
}

proptest! {
    #[test]
    fn the_form_is_one_and_holds_what_was_written((address, prefix) in any_cidr()) {
        let network = Cidr::new(address, prefix).unwrap();
        prop_assert!(network.contains(address));
        prop_assert_eq!(network.to_string().parse::<Cidr>(), Ok(network));
        prop_assert_eq!(Cidr::new(network.address(), network.prefix()), Ok(network));
        let json = serde_json::to_string(&network).unwrap();
        prop_assert_eq!(serde_json::from_str::<Cidr>(&json).unwrap(), network);
    }

    #[test]
    fn exactly_the_prefix_decides(a: u32, b: u32, prefix in 0_u8..=32) {
        let network = Cidr::new(Ipv4Addr::from(a).into(), prefix).unwrap();
        let same = (a ^ b).leading_zeros() >= prefix.into();
        prop_assert_eq!(network.contains(Ipv4Addr::from(b).into()), same);
    }

    #[test]
    fn normalising_twice_changes_nothing(
        cidrs in prop::collection::vec(any_cidr(), 0..8),
        ports in prop::collection::vec(1_u16.., 0..8),
    ) {
        let write = |(address, prefix): &(IpAddr, u8)| format!("{address}/{prefix}");
        let input = PolicyInput {
            ignore_source_cidrs: cidrs.iter().map(write).collect(),
            ignore_destination_ports: ports,
            ..enabled()
        };
        let Ok(Policy::Enabled(once)) = input.normalise() else { panic!("refused") };
        let again = PolicyInput {
            ignore_source_cidrs: once.ignore_source_cidrs.iter().map(Cidr::to_string).collect(),
            ignore_destination_ports: once.ignore_destination_ports.clone(),
            ..enabled()
        };
        prop_assert_eq!(again.normalise(), Ok(Policy::Enabled(once)));
    }
}
