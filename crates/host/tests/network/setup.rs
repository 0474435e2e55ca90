//! What is made, made again, and removed.
use std::fs;

use doze_host::net::{NetError, Network, NetworkConfig, TapConfig};

use crate::{frames, world::*};

fn link(name: &str) -> serde_json::Value {
    json(&format!("ip -j -d link show {name}"))[0].clone()
}

fn sysctl(path: &str) -> String {
    fs::read_to_string(format!("/proc/sys/net/{path}"))
        .unwrap()
        .trim()
        .to_owned()
}

#[test]
fn bridge_and_tap_are_as_documented() {
    inside("setup::bridge_and_tap_are_as_documented", async || {
        let network = network().await;
        let bridge = link("doze0");
        let mac = bridge["address"].clone();
        let data = &bridge["linkinfo"]["info_data"];
        assert_eq!(
            (&data["stp_state"], &data["forward_delay"]),
            (&0.into(), &0.into())
        );
        assert_eq!(data["mcast_snooping"], 0);

        network.ensure_tap(&tap(2)).await.unwrap();
        let port = link("dz-2");
        assert_eq!(
            (&port["master"], &port["ifalias"]),
            (&"doze0".into(), &"instance-2".into())
        );
        assert!(
            port["flags"].as_array().unwrap().contains(&"UP".into()),
            "{port}"
        );
        let tun = &port["linkinfo"]["info_data"];
        assert_eq!(
            (&tun["type"], &tun["pi"], &tun["vnet_hdr"]),
            (&"tap".into(), &false.into(), &true.into())
        );
        assert_eq!(
            (&tun["persist"], &tun["multi_queue"]),
            (&true.into(), &false.into())
        );
        assert_eq!(
            tun["user"], "root",
            "without an owner every user could open it"
        );
        let slave = &port["linkinfo"]["info_slave_data"];
        assert_eq!(slave["isolated"], true);
        assert_eq!(
            (&slave["learning"], &slave["flood"]),
            (&false.into(), &false.into())
        );
        let forwarding = run("bridge fdb show dev dz-2");
        assert!(
            forwarding.contains("02:00:0a:4d:01:02 master doze0 static"),
            "{forwarding}"
        );

        assert_eq!(
            link("doze0")["address"],
            mac,
            "the bridge's MAC follows its ports"
        );
        assert_eq!(sysctl("ipv4/ip_forward"), "1");
        for name in ["doze0", "dz-2"] {
            assert_eq!(sysctl(&format!("ipv6/conf/{name}/disable_ipv6")), "1");
            assert_eq!(
                json(&format!("ip -j -6 addr show dev {name}"))
                    .as_array()
                    .unwrap()
                    .iter()
                    .filter(|a| a["addr_info"].as_array().is_some_and(|i| !i.is_empty()))
                    .count(),
                0
            );
        }
    });
}

#[test]
fn everything_may_be_done_twice_and_stays_as_it_was() {
    inside(
        "setup::everything_may_be_done_twice_and_stays_as_it_was",
        async || {
            let (network, mut a, _b) = with_two_guests().await;
            let see = || {
                // With all details, except the bridge's running timers.
                let mut last = "";
                let details = run("ip -o -d link show");
                let links: Vec<&str> = details
                    .split_whitespace()
                    .filter(|word| !std::mem::replace(&mut last, word).ends_with("_timer"))
                    .collect();
                let (forwarding, addresses) =
                    (run("bridge fdb show"), run("ip addr show dev doze0"));
                [ruleset(), links.join(" "), forwarding, addresses]
            };
            let before = see();
            let again = Network::ensure(config()).await.unwrap();
            // While a VMM, here the test, has it open.
            again.ensure_tap(&tap(2)).await.unwrap();
            again.ensure_tap(&tap(3)).await.unwrap();
            assert_eq!(see(), before);
            a.ping_gateway();
            network.delete_tap("dz-9").await.unwrap();
            assert_eq!(see(), before);
        },
    );
}

#[test]
fn a_restarting_server_neither_cuts_nor_opens_running_guests() {
    inside(
        "setup::a_restarting_server_neither_cuts_nor_opens_running_guests",
        async || {
            let (_network, mut a, b) = with_two_guests().await;
            let before = echoes_at_the_host();
            let restarts = tokio::spawn(async {
                for _ in 0..30 {
                    Network::ensure(config()).await.unwrap();
                }
            });
            let spoofed = frames::ipv4(b.ip, GATEWAY, frames::ICMP, &frames::echo(8, 999));
            let to_b = frames::ethernet(
                b.mac,
                a.mac,
                frames::IPV4,
                &frames::udp_packet(a.ip, b.ip, 9, b"x"),
            );
            let mut pings = 0;
            while !restarts.is_finished() || pings == 0 {
                a.send_ip(&spoofed);
                a.send(&to_b);
                a.send_ip(&frames::udp_packet(a.ip, b.ip, 9, b"x"));
                a.ping_gateway();
                pings += 1;
                tokio::task::yield_now().await;
            }
            restarts.await.unwrap();
            assert_eq!(
                echoes_at_the_host(),
                before + pings,
                "a spoofed echo got through"
            );
            let leaked = b
                .drain()
                .into_iter()
                .filter(|frame| frame.ipv4().is_some())
                .count();
            assert_eq!(leaked, 0, "of {pings} rounds");
        },
    );
}

#[test]
fn new_addresses_of_a_tap_replace_the_old() {
    inside(
        "setup::new_addresses_of_a_tap_replace_the_old",
        async || {
            let (network, _a, _b) = with_two_guests().await;
            let moved = TapConfig {
                mac: "02:00:0a:4d:02:02".into(),
                ip: "10.77.2.2".parse().unwrap(),
                ..tap(2)
            };
            network.ensure_tap(&moved).await.unwrap();
            let everything = ruleset() + &run("bridge fdb show");
            assert!(
                !everything.contains("02:00:0a:4d:01:02") && !everything.contains("10.77.1.2"),
                "{everything}"
            );
            assert!(
                everything.contains("02:00:0a:4d:02:02") && everything.contains("10.77.2.2"),
                "{everything}"
            );
        },
    );
}

#[test]
fn deleting_leaves_nothing() {
    inside("setup::deleting_leaves_nothing", async || {
        let network = network().await;
        let (rules, links) = (ruleset(), run("ip -o link show"));
        network.ensure_tap(&tap(2)).await.unwrap();
        let guest = Guest::new(2);
        assert_ne!(ruleset(), rules);
        // Although it is still open.
        network.delete_tap("dz-2").await.unwrap();
        drop(guest);
        assert_eq!(ruleset(), rules);
        // The bridge's own line tells whether it has a carrier, so names are what counts.
        let names = |text: &str| -> Vec<String> {
            text.lines()
                .map(|line| line.split(": ").nth(1).unwrap().to_owned())
                .collect()
        };
        assert_eq!(names(&run("ip -o link show")), names(&links));
        assert!(!run("bridge fdb show").contains("02:00:0a:4d:01:02"));
        network.delete_tap("dz-2").await.unwrap();
    });
}

#[test]
fn many_at_once() {
    inside("setup::many_at_once", async || {
        let network = network().await;
        let rules = ruleset();
        let all = |range: std::ops::Range<u8>| range.map(|n| (tap(n).tap, tap(n).alias));
        let each = async |delete: bool| {
            let tasks: Vec<_> = (2..26)
                .map(|n| {
                    let network = network.clone();
                    tokio::spawn(async move {
                        match delete {
                            true => network.delete_tap(&tap(n).tap).await,
                            false => network.ensure_tap(&tap(n)).await,
                        }
                    })
                })
                .collect();
            for task in tasks {
                task.await.unwrap().unwrap();
            }
        };
        each(false).await;
        let mut taps = network.list_taps().await.unwrap();
        taps.sort();
        let mut wanted: Vec<_> = all(2..26).collect();
        wanted.sort();
        assert_eq!(taps, wanted);
        let mut guest = Guest::new(25);
        guest.find_router(GATEWAY);
        guest.ping_gateway();
        each(true).await;
        assert!(network.list_taps().await.unwrap().is_empty());
        assert_eq!(ruleset(), rules);
    });
}

#[test]
fn others_links_and_tables_are_left_alone() {
    inside(
        "setup::others_links_and_tables_are_left_alone",
        async || {
            run("nft add table inet filter");
            run("nft add table bridge dozen");
            run(
                "nft add chain inet filter forward { type filter hook forward priority 0 ; policy drop ; }",
            );
            let foreign = ruleset();
            let network = network().await;
            network.ensure_tap(&tap(2)).await.unwrap();
            network.delete_tap("dz-2").await.unwrap();
            run("ip link add veth2 type veth peer name dz-2");
            run("ip link set dz-2 master doze0");
            run("ip link add br-lan type bridge");
            run("ip tuntap add dev dz-3 mode tap");
            run("ip link set dz-3 master br-lan");
            run("ip tuntap add dev dz-4 mode tun");
            for name in ["dz-2", "dz-3", "dz-4"] {
                let n = name.as_bytes()[3] - b'0';
                for outcome in [
                    network.ensure_tap(&tap(n)).await,
                    network.delete_tap(name).await,
                ] {
                    let error = outcome.unwrap_err().to_string();
                    assert!(
                        error.contains(name) && error.contains("left alone"),
                        "{error}"
                    );
                }
                run(&format!("ip link show {name}"));
            }
            assert!(
                network.list_taps().await.unwrap().is_empty(),
                "a veth is not a TAP"
            );
            run("nft delete table inet doze");
            run("nft delete table bridge doze");
            assert_eq!(ruleset(), foreign);

            let error = Network::ensure(NetworkConfig {
                bridge: "br-lan".into(),
                ..config()
            })
            .await
            .unwrap_err();
            assert!(error.to_string().contains("not made by doze"), "{error}");
            let error = Network::ensure(NetworkConfig {
                bridge: "veth2".into(),
                ..config()
            })
            .await
            .unwrap_err();
            assert!(error.to_string().contains("not made by doze"), "{error}");
            assert_eq!(ruleset(), foreign, "refused, but the rules were made");
        },
    );
}

#[test]
fn a_tap_belongs_to_one_instance_and_one_user() {
    inside(
        "setup::a_tap_belongs_to_one_instance_and_one_user",
        async || {
            let network = network().await;
            network.ensure_tap(&tap(2)).await.unwrap();
            let taken = TapConfig {
                alias: "instance-x".into(),
                ..tap(2)
            };
            let error = network.ensure_tap(&taken).await.unwrap_err().to_string();
            assert!(
                error.contains("instance-2") && error.contains("instance-x"),
                "{error}"
            );

            let owned = TapConfig {
                owner: Some(4321),
                ..tap(2)
            };
            network.ensure_tap(&owned).await.unwrap();
            assert_eq!(
                link("dz-2")["linkinfo"]["info_data"]["user"]
                    .to_string()
                    .trim_matches('"'),
                "4321"
            );
            // Half-made: never given an alias nor joined to the bridge.
            run("ip tuntap add dev dz-3 mode tap vnet_hdr");
            network.ensure_tap(&tap(3)).await.unwrap();
            assert_eq!(network.list_taps().await.unwrap().len(), 2);
        },
    );
}

#[test]
fn a_new_gateway_replaces_the_old() {
    inside("setup::a_new_gateway_replaces_the_old", async || {
        network().await;
        let moved = NetworkConfig {
            subnet: "10.78.0.0/24".parse().unwrap(),
            gateway: "10.78.0.1".parse().unwrap(),
            ..config()
        };
        Network::ensure(moved).await.unwrap();
        let addresses = run("ip -o addr show dev doze0");
        assert!(
            addresses.contains("10.78.0.1/24") && !addresses.contains("10.77."),
            "{addresses}"
        );
        assert!(!ruleset().contains("10.77."));
    });
}

#[test]
fn two_servers_share_a_namespace() {
    inside("setup::two_servers_share_a_namespace", async || {
        let (_first, mut a, _b) = with_two_guests().await;
        let second = NetworkConfig {
            bridge: "doze1".into(),
            subnet: "10.78.0.0/16".parse().unwrap(),
            gateway: "10.78.0.1".parse().unwrap(),
            table: "doze-two".into(),
            guest_to_host: false,
        };
        let second = Network::ensure(second).await.unwrap();
        second
            .ensure_tap(&TapConfig {
                ip: "10.78.1.4".parse().unwrap(),
                ..tap(4)
            })
            .await
            .unwrap();
        assert_eq!(
            second.list_taps().await.unwrap(),
            [("dz-4".to_owned(), "instance-4".to_owned())]
        );
        a.ping_gateway();
        assert_ne!(link("doze0")["address"], link("doze1")["address"]);
    });
}

#[test]
fn what_is_missing_is_named() {
    inside("setup::what_is_missing_is_named", async || {
        // No capability on this thread, so also none for the sockets it opens.
        rustix::thread::set_capabilities(
            None,
            rustix::thread::CapabilitySets {
                effective: rustix::thread::CapabilitySet::empty(),
                permitted: rustix::thread::CapabilitySet::empty(),
                inheritable: rustix::thread::CapabilitySet::empty(),
            },
        )
        .unwrap();
        let error = Network::ensure(config()).await.unwrap_err();
        assert!(
            matches!(&error, NetError::Missing { mend, .. } if mend.contains("CAP_NET_ADMIN")),
            "{error}"
        );
        assert!(!fs::exists("/proc/sys/net/ipv4/conf/doze0").unwrap());
    });
}
