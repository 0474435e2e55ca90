//! Clients that come in the very moment in which their instance falls asleep.
//!
//! Two instances become idle at the same time and have one turn between them, so that one of them
//! waits for it. Each gets a client at a random moment around the pause. Whoever's first packet was
//! sent before the snapshot was committed must be served as if nothing had been; whoever came later finds a sleeper, and is
//! served once that is woken.
use std::net::{IpAddr, SocketAddr};

use doze_e2e::{phases::now_ms, sample::Random};
use rustix::net::{AddressFamily, SocketFlags, SocketType};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
    time::Instant,
};

use super::*;

/// Two clients each.
const CAMPAIGN: usize = 100;
const SAMPLE: usize = 6;
const IDLE: Duration = Duration::from_millis(700);
/// When a client comes, milliseconds after the end of the idle time: at first around this. Whoever was served comes
/// later the next time, and whoever found a sleeper earlier, so that the rounds gather around the commit however
/// fast the machine is.
const FIRST: i64 = 150;
const STEP: i64 = 30;
const SPREAD: i64 = 90;
const RANGE: std::ops::RangeInclusive<i64> = -50..=3000;
/// Beyond this a client hangs.
const HANGS: Duration = Duration::from_secs(60);

pub fn cases(sample: &Sample) -> Vec<Case> {
    let (random, rounds) = (
        sample.random("boundary"),
        if sample.campaign { CAMPAIGN } else { SAMPLE },
    );
    let seed = sample.seed;
    vec![
        Case::new(
            "nobody_who_came_before_the_commit_notices",
            move |world: &World| Box::pin(case(world, random.clone(), rounds, seed)),
        )
        .deadline(Duration::from_secs(3600)),
    ]
}

/// How a client fared.
#[derive(Debug)]
enum Fared {
    Served,
    FoundASleeper,
}

#[derive(Debug, Default)]
struct Tally {
    served: usize,
    sleepers: usize,
    called_off: f64,
}

async fn case(world: &World, mut random: Random, rounds: usize, seed: u64) -> Result<()> {
    world.api_with_demo().await?;
    world.server.stop().await?;
    let one = [("DOZE_AUTO_STANDBY__MAX_CONCURRENT", "1")];
    world.server.start_with(&one).await?;
    let api = world.api().await?;
    let pair = [redis(world, "left").await?, redis(world, "right").await?];
    let mut tally = Tally::default();
    let mut around = [FIRST; 2];
    for round in 0..rounds {
        let offsets = around.map(|around| {
            let spread = usize::try_from(2 * SPREAD).unwrap_or(1);
            around - SPREAD + i64::try_from(random.below(spread)).unwrap_or(0)
        });
        let fared = one_round(api, &pair, offsets).await;
        let fared = fared.with_context(|| format!("seed {seed}, round {round}, {offsets:?}"))?;
        for (one, around) in fared.into_iter().zip(&mut around) {
            let step = match one {
                Fared::Served => {
                    tally.served += 1;
                    STEP
                }
                Fared::FoundASleeper => {
                    tally.sleepers += 1;
                    -STEP
                }
            };
            *around = (*around + step).clamp(*RANGE.start(), *RANGE.end());
        }
    }
    let text = api.get("/metrics").await?.text;
    let name = "doze_auto_standby_attempts_total{status=\"called_off\"} ";
    let called_off = text.lines().find_map(|line| line.strip_prefix(name));
    tally.called_off = called_off.context("metric")?.parse()?;
    println!(
        "    {}: {tally:?}, at last around {around:?} ms",
        world.name
    );
    for (id, _) in &pair {
        api.remove(id).await?;
    }
    Ok(())
}

async fn one_round(
    api: &Api,
    pair: &[(String, SocketAddr); 2],
    offsets: [i64; 2],
) -> Result<[Fared; 2]> {
    // Both are awake and answer; then both may sleep from the same moment on.
    for (id, address) in pair {
        set(api, id, &json!({"enabled": false})).await?;
        awake(api, id).await?;
        ping(connect(*address)?.0)
            .await
            .context("between two rounds")?;
    }
    let on = on(IDLE);
    let (left, right) = tokio::join!(set(api, &pair[0].0, &on), set(api, &pair[1].0, &on));
    left?;
    right?;
    let due = Instant::now() + IDLE;
    let fare = |index: usize| {
        let (id, address) = &pair[index];
        let millis = offsets[index];
        let shift = Duration::from_millis(millis.unsigned_abs());
        let at = if millis < 0 { due - shift } else { due + shift };
        one_client(api, id, *address, at)
    };
    let (left, right) = tokio::join!(fare(0), fare(1));
    Ok([left.context("left")?, right.context("right")?])
}

async fn one_client(api: &Api, id: &str, address: SocketAddr, at: Instant) -> Result<Fared> {
    tokio::time::sleep_until(at).await;
    let (stream, sent) = connect(address)?;
    let mut served = Box::pin(ping(stream));
    let end = Instant::now() + HANGS;
    loop {
        tokio::select! {
            outcome = &mut served => match outcome {
                Ok(()) => return Ok(Fared::Served),
                // A sleeper does not answer who asks for its address.
                Err(error) if !found_a_sleeper(api, id, sent).await? => {
                    return Err(error.context(format!("a client of {sent}")));
                }
                Err(_) => break,
            },
            () = tokio::time::sleep(Duration::from_millis(20)) => {}
        }
        ensure!(
            Instant::now() < end,
            "its client hangs: {}",
            api.instance(id).await?
        );
        if found_a_sleeper(api, id, sent).await? {
            break;
        }
    }
    // What wakes it by itself is yet to be built. Whoever comes then is served.
    set(api, id, &json!({"enabled": false})).await?;
    awake(api, id).await?;
    ping(connect(address)?.0).await.context("after waking it")?;
    Ok(Fared::FoundASleeper)
}

/// Whether it sleeps; an error if the client's first packet had come before the commit.
async fn found_a_sleeper(api: &Api, id: &str, sent: i128) -> Result<bool> {
    let instance = api.instance(id).await?;
    if instance["state"] != "Standby" {
        return Ok(false);
    }
    let committed = committed_at(api, id).await?;
    ensure!(
        sent >= committed,
        "it sleeps under a client whose first packet came {} ms before the commit",
        committed - sent
    );
    Ok(true)
}

async fn awake(api: &Api, id: &str) -> Result<()> {
    if api.instance(id).await?["state"] == "Standby" {
        restore(api, id).await?;
    }
    api.wait(id, "Running", 90).await
}

/// When the last standby's snapshot was marked valid, by the instance's own log: Unix milliseconds, cut off.
async fn committed_at(api: &Api, id: &str) -> Result<i128> {
    let log = api.log_lines(id, "?source=hypeman&tail=20").await?;
    let line = log.iter().rev().find(|line| line.contains("standby took"));
    let line = line.with_context(|| format!("no standby in {log:?}"))?;
    let (stamp, laps) = line.split_once(' ').context("a stamp")?;
    let lap = |name: &str| -> Result<f64> {
        let rest = laps
            .split_once(name)
            .with_context(|| format!("no {name}: {line}"))?
            .1;
        let text = rest.trim_start().split(' ').next().unwrap_or_default();
        text.parse().with_context(|| line.clone())
    };
    let before_the_end = lap("asleep")? - lap("durable")?;
    // Rounded towards the past by more than the digits that are cut off.
    Ok(parse_time(stamp)? - before_the_end.ceil() as i128 - 1)
}

/// Returns when the first packet has been handed to the kernel, with that moment.
fn connect(address: SocketAddr) -> Result<(std::net::TcpStream, i128)> {
    let IpAddr::V4(_) = address.ip() else {
        bail!("{address} is not IPv4")
    };
    let socket = rustix::net::socket_with(
        AddressFamily::INET,
        SocketType::STREAM,
        SocketFlags::NONBLOCK | SocketFlags::CLOEXEC,
        None,
    )?;
    match rustix::net::connect(&socket, &address) {
        Ok(()) | Err(rustix::io::Errno::INPROGRESS) => {}
        Err(e) => return Err(e).with_context(|| format!("connect to {address}")),
    }
    Ok((socket.into(), now_ms()))
}

/// One question and its answer, then the end.
async fn ping(stream: std::net::TcpStream) -> Result<()> {
    let exchange = async {
        let mut stream = TcpStream::from_std(stream)?;
        stream.writable().await?;
        if let Some(error) = stream.take_error()? {
            return Err(error.into());
        }
        stream.write_all(b"PING\r\n").await?;
        let mut answer = [0; 7];
        stream.read_exact(&mut answer).await?;
        ensure!(answer == *b"+PONG\r\n", "{answer:?}");
        anyhow::Ok(())
    };
    tokio::time::timeout(HANGS, exchange)
        .await
        .context("no answer")?
}
