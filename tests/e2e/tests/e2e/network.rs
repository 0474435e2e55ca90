//! What guests can reach and who can reach them.
use std::{net::SocketAddr, process::Stdio, time::Duration};

use anyhow::{Context as _, Result, bail, ensure};
use doze_e2e::{Case, World, exec, procs, sandbox::OUTSIDE, server::free_port};
use serde_json::json;
use tokio::{
    io::{AsyncBufReadExt as _, AsyncReadExt as _, BufReader},
    net::{TcpListener, TcpStream},
};

pub fn cases() -> Vec<Case> {
    doze_e2e::cases![
        guests_do_not_reach_each_other,
        guest_does_not_reach_the_host,
        outwards_through_nat,
        network_of_the_guest,
        network_off,
        our_rules_only,
    ]
}

/// A guest that answers on TCP port 7000.
async fn boot_answering(world: &World, stem: &str) -> Result<(String, String)> {
    let cmd = [
        "/bin/sh",
        "-c",
        "while :; do echo answer | nc -l -p 7000; done",
    ];
    let id = world.boot(world.tiny_running(stem, &cmd)).await?;
    let ip = world.api().await?.instance(&id).await?["network"]["ip"]
        .as_str()
        .context("ip")?
        .to_owned();
    Ok((id, ip))
}

/// From the host: the line the guest answers with.
async fn ask(ip: &str) -> Result<String> {
    let address: SocketAddr = format!("{ip}:7000").parse()?;
    let attempts = async {
        loop {
            if let Ok(mut stream) = TcpStream::connect(address).await {
                let mut text = String::new();
                if stream.read_to_string(&mut text).await.is_ok() && !text.is_empty() {
                    return text;
                }
            }
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(30), attempts)
        .await
        .with_context(|| format!("{address} does not answer the host"))
}

async fn guests_do_not_reach_each_other(world: &World) -> Result<()> {
    let api = world.api().await?;
    let (a, a_ip) = boot_answering(world, "alpha").await?;
    let (b, b_ip) = boot_answering(world, "beta").await?;
    // The same thing works from the host, so it is not the guest that does not answer.
    ensure!(ask(&a_ip).await? == "answer\n" && ask(&b_ip).await? == "answer\n");
    for (from, to) in [(&a, &b_ip), (&b, &a_ip)] {
        let said = exec::run(
            api,
            from,
            &[
                "sh",
                "-c",
                &format!("nc -w 3 {to} 7000 </dev/null; ping -c 2 -W 1 {to}"),
            ],
        )
        .await?;
        ensure!(
            said.code != 0
                && !said.text().contains("answer")
                && !said.text().contains("bytes from"),
            "reached {to}: {}",
            said.text()
        );
        // Nor with a neighbour entry and a route forged by root in the guest.
        let mac = api.instance(if from == &a { &b } else { &a }).await?["network"]["mac"]
            .as_str()
            .context("mac")?
            .to_owned();
        let forged = format!("arp -s {to} {mac}; ping -c 2 -W 1 {to}");
        let said = exec::run(api, from, &["sh", "-c", &forged]).await?;
        ensure!(
            !said.text().contains("bytes from"),
            "reached {to} with a forged neighbour: {}",
            said.text()
        );
    }
    ensure!(ask(&a_ip).await? == "answer\n");
    api.remove(&a).await?;
    api.remove(&b).await
}

/// The default policy: guests cannot open connections to services of their host.
async fn guest_does_not_reach_the_host(world: &World) -> Result<()> {
    let (api, id) = (world.api().await?, world.pet().await?);
    let gateway = world.server.gateway();
    let listener = TcpListener::bind((gateway.as_str(), 0))
        .await
        .with_context(|| format!("listen on the bridge's {gateway}"))?;
    let port = listener.local_addr()?.port();
    let said = exec::run(
        api,
        id,
        &[
            "sh",
            "-c",
            &format!("nc -w 3 {gateway} {port} </dev/null && echo reached"),
        ],
    )
    .await?;
    ensure!(
        !said.text().contains("reached"),
        "the guest reached the host's {gateway}:{port}"
    );
    // The API itself listens on loopback only; nor may the uplink's address be a way around.
    let said = exec::run(
        api,
        id,
        &[
            "sh",
            "-c",
            &format!(
                "nc -w 3 {} {port} </dev/null && echo reached",
                doze_e2e::sandbox::HOST_SIDE
            ),
        ],
    )
    .await?;
    ensure!(
        !said.text().contains("reached"),
        "the guest reached the host over its other address"
    );
    Ok(())
}

/// A listener beyond the host sees the host's address, because it has no route to the guests.
async fn outwards_through_nat(world: &World) -> Result<()> {
    let (api, id) = (world.api().await?, world.pet().await?);
    let port = free_port()?;
    let mut listener = world
        .sandbox
        .outside_listener(port)?
        .spawn()
        .context("listener outside")?;
    let mut lines = BufReader::new(listener.stdout.take().context("stdout")?).lines();
    ensure!(lines.next_line().await?.as_deref() == Some("listening"));
    let said = exec::run(
        api,
        id,
        &["sh", "-c", &format!("nc -w 10 {OUTSIDE} {port} </dev/null")],
    )
    .await?;
    ensure!(
        said.text() == "hello from outside\n",
        "the guest heard {:?}",
        said.text()
    );
    let peer = lines.next_line().await?.context("no peer")?;
    ensure!(
        peer == doze_e2e::sandbox::HOST_SIDE.to_string(),
        "the outside saw {peer}"
    );
    listener.wait().await?;
    // And nobody out there can open a connection to a guest by routing to it over this host.
    let ip = api.instance(id).await?["network"]["ip"]
        .as_str()
        .context("ip")?
        .to_owned();
    let status = tokio::process::Command::new("ip")
        .args([
            "netns",
            "exec",
            &world.sandbox.outside(),
            "busybox",
            "ping",
            "-c",
            "1",
            "-W",
            "1",
            &ip,
        ])
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status()
        .await?;
    ensure!(
        !status.success(),
        "{ip} answers the outside, which has no route to it"
    );
    Ok(())
}

async fn network_of_the_guest(world: &World) -> Result<()> {
    let (api, id) = (world.api().await?, world.pet().await?);
    let network = api.instance(id).await?["network"].clone();
    ensure!(
        network["enabled"] == true && network["name"] == "default",
        "{network}"
    );
    let (ip, mac) = (
        network["ip"].as_str().context("ip")?,
        network["mac"].as_str().context("mac")?,
    );
    let have = exec::sh(
        api,
        id,
        "ip addr show; ip route; cat /etc/resolv.conf /etc/hosts",
    )
    .await?;
    ensure!(
        have.contains(&format!("inet {ip}/16")) && have.contains(mac),
        "{have}"
    );
    ensure!(
        have.contains(&format!("default via {}", world.server.gateway())),
        "{have}"
    );
    ensure!(
        exec::sh(api, id, "ip addr show lo")
            .await?
            .contains("127.0.0.1")
    );
    // A spoofed source does not leave the TAP.
    let spoofed = exec::run(
        api,
        id,
        &[
            "sh",
            "-c",
            &format!("ip addr add 10.99.99.99/32 dev lo; ping -I 10.99.99.99 -c 1 -W 1 {OUTSIDE}"),
        ],
    )
    .await?;
    ensure!(
        !spoofed.text().contains("bytes from"),
        "a spoofed address got an answer: {}",
        spoofed.text()
    );
    Ok(())
}

async fn network_off(world: &World) -> Result<()> {
    let api = world.api().await?;
    let taps = procs::taps(&world.server.bridge)?;
    let mut request = world.tiny("offline");
    request["network"] = json!({"enabled": false});
    let id = world.boot(request).await?;
    let instance = api.instance(&id).await?;
    ensure!(
        instance["network"]["enabled"] == false && instance["network"]["ip"].is_null(),
        "{instance}"
    );
    ensure!(
        procs::taps(&world.server.bridge)? == taps,
        "a TAP was made for an instance without network"
    );
    ensure!(exec::sh(api, &id, "ls /sys/class/net").await? == "lo");
    api.remove(&id).await
}

/// Rules of somebody else survive a start of the server and an instance's whole life.
async fn our_rules_only(world: &World) -> Result<()> {
    let api = world.api().await?;
    let table = format!("others{}", world.server.bridge);
    let nft = |script: String| async move {
        let output = tokio::process::Command::new("nft")
            .arg(&script)
            .output()
            .await?;
        if !output.status.success() {
            bail!("nft {script}: {}", String::from_utf8_lossy(&output.stderr));
        }
        anyhow::Ok(())
    };
    nft(format!("add table inet {table}; add chain inet {table} kept {{ type filter hook forward priority 100; }}; add rule inet {table} kept counter accept")).await?;
    let id = world.boot_tiny("rules").await?;
    api.remove(&id).await?;
    ensure!(
        procs::ruleset()?.contains(&table),
        "a foreign table is gone"
    );
    nft(format!("delete table inet {table}")).await
}
