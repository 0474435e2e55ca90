//! A guest that wakes with the addresses of another one: its TAP is there, and reaches nobody.
use doze_host::net::{Network, NetworkConfig, TapConfig};
use rustix::io::Errno;

use crate::{frames, world::*};

fn names(taps: &[(String, String)]) -> Vec<(&str, &str)> {
    let mut names: Vec<_> = taps.iter().map(|(t, i)| (t.as_str(), i.as_str())).collect();
    names.sort_unstable();
    names
}

/// Whether it is up, its bridge, and its alias.
fn state(name: &str) -> (bool, serde_json::Value, serde_json::Value) {
    let link = json(&format!("ip -j link show {name}"))[0].clone();
    let up = link["flags"].as_array().unwrap().contains(&"UP".into());
    (up, link["master"].clone(), link["ifalias"].clone())
}

#[test]
fn a_detached_guest_reaches_nobody_until_it_is_attached() {
    inside(
        "detached::a_detached_guest_reaches_nobody_until_it_is_attached",
        async || {
            let (network, mut a, mut b) = with_two_guests().await;
            network.ensure_tap_detached(&tap(4)).await.unwrap();
            // Its VMM opens it, and it wakes as b.
            let mut fork = Guest::new(4);
            let detached = (false, serde_json::Value::Null, "doze0/instance-4".into());
            assert_eq!(state("dz-4"), detached);
            assert!(ruleset().contains("02:00:0a:4d:01:04"), "no rules yet");
            let as_b = frames::arp_request(b.mac, b.ip, GATEWAY);
            assert_eq!(fork.try_send(&as_b), Err(Errno::IO));
            // What is for b still comes to b.
            a.ping_gateway();
            b.ping_gateway();
            assert!(fork.drain().is_empty());
            network.ensure_tap_detached(&tap(4)).await.unwrap();
            assert_eq!(state("dz-4"), detached);

            // It says that it is somebody else now.
            network.ensure_tap(&tap(4)).await.unwrap();
            assert_eq!(state("dz-4"), (true, "doze0".into(), "instance-4".into()));
            fork.find_router(GATEWAY);
            fork.ping_gateway();
            b.ping_gateway();

            network.ensure_tap_detached(&tap(4)).await.unwrap();
            assert_eq!(state("dz-4"), detached);
            assert!(!run("bridge fdb show").contains("02:00:0a:4d:01:04 dev dz-4 master"));
            assert_eq!(fork.try_send(&as_b), Err(Errno::IO));
        },
    );
}

#[test]
fn a_detached_tap_is_found_by_its_own_server_alone() {
    inside(
        "detached::a_detached_tap_is_found_by_its_own_server_alone",
        async || {
            let first = network().await;
            let rules = ruleset();
            let second = Network::ensure(NetworkConfig {
                bridge: "doze1".into(),
                subnet: "10.78.0.0/16".parse().unwrap(),
                gateway: "10.78.0.1".parse().unwrap(),
                table: "doze-two".into(),
                guest_to_host: false,
            })
            .await
            .unwrap();
            let of_second = TapConfig {
                ip: "10.78.1.5".parse().unwrap(),
                ..tap(5)
            };
            // An operator's, which is nobody's port and has no alias or one of his own.
            run("ip tuntap add dev dz-6 mode tap vnet_hdr");
            run("ip tuntap add dev dz-7 mode tap vnet_hdr");
            run("ip link set dz-7 alias Printers/ground-floor");
            first.ensure_tap(&tap(2)).await.unwrap();
            first.ensure_tap_detached(&tap(3)).await.unwrap();
            second.ensure_tap_detached(&of_second).await.unwrap();
            assert_eq!(
                names(&first.list_taps().await.unwrap()),
                [("dz-2", "instance-2"), ("dz-3", "instance-3")]
            );
            assert_eq!(
                names(&second.list_taps().await.unwrap()),
                [("dz-5", "instance-5")]
            );
            for outcome in [
                first.ensure_tap(&tap(5)).await,
                first.ensure_tap_detached(&tap(5)).await,
                first.delete_tap("dz-5").await,
            ] {
                let error = outcome.unwrap_err().to_string();
                assert!(error.contains("left alone"), "{error}");
            }
            let taken = TapConfig {
                alias: "instance-x".into(),
                ..tap(3)
            };
            let error = first.ensure_tap_detached(&taken).await.unwrap_err();
            assert!(error.to_string().contains("instance-3"), "{error}");

            second.delete_tap("dz-5").await.unwrap();
            for (name, _) in first.list_taps().await.unwrap() {
                first.delete_tap(&name).await.unwrap();
            }
            run("nft delete table inet doze-two");
            run("nft delete table bridge doze-two");
            // Refused, but rules were made for the TAP; they bind nobody else's frames on our bridge.
            first.delete_tap("dz-5").await.unwrap();
            assert_eq!(ruleset(), rules);
            assert!(first.list_taps().await.unwrap().is_empty());
            run("ip link show dz-6");
            run("ip link show dz-7");
        },
    );
}
