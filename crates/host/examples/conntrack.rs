//! Measures the connection tracker against the real kernel: events per second of one core, and
//! memory. Run as root on an idle machine, in a network namespace of its own:
//!
//! ```text
//!  cargo build --release -p doze-host --example conntrack
//!  unshare --net target/release/examples/conntrack 200000
//! ```
//!
//! A second thread makes the kernel create and forget connections over ctnetlink; the kernel sends
//! the same events as for packets. The argument is the number of flows.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    reason = "a measurement that cannot go on ends"
)]
use std::{
    net::Ipv4Addr,
    os::fd::OwnedFd,
    process::Command,
    time::{Duration, Instant},
};

use doze_host::conntrack::{Family, Observer, Options, Tracker, TrackerOptions};
use rustix::{
    net::{
        AddressFamily, SendFlags, SocketType,
        netlink::{NETFILTER, SocketAddrNetlink},
        sendto, socket,
    },
    thread::CpuSet,
    time::{ClockId, clock_gettime},
};

#[path = "../tests/conntrack/encode.rs"]
#[allow(dead_code, reason = "shared with tests that use more of it")]
mod encode;

const GUESTS: u32 = 200;

fn connection(n: u32) -> encode::Connection {
    let client = Ipv4Addr::from(u32::from(Ipv4Addr::new(198, 18, 0, 0)) + n / 50_000);
    let guest = Ipv4Addr::from(u32::from(Ipv4Addr::new(10, 77, 0, 2)) + n % GUESTS);
    let port = u16::try_from(n % 50_000).unwrap() + 1;
    encode::Connection::tcp(client, port, guest, 80)
}

fn pin(core: usize) {
    let mut set = CpuSet::new();
    set.set(core);
    rustix::thread::sched_setaffinity(None, &set).unwrap();
}

fn send(socket: &OwnedFd, messages: &[Vec<u8>]) {
    let kernel = SocketAddrNetlink::new(0, 0);
    sendto(socket, &messages.concat(), SendFlags::empty(), &kernel).unwrap();
}

fn cpu_time() -> Duration {
    let time = clock_gettime(ClockId::ThreadCPUTime);
    Duration::new(
        time.tv_sec.unsigned_abs(),
        u32::try_from(time.tv_nsec).unwrap(),
    )
}

fn memory(field: &str) -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find(|line| line.starts_with(field)).unwrap();
    line.split_whitespace().nth(1).unwrap().parse().unwrap()
}

/// Waits until the kernel's events have all been handled.
async fn settled(tracker: &Tracker, flows: u64, events: impl Fn() -> u64) {
    loop {
        let before = events();
        tokio::time::sleep(Duration::from_millis(300)).await;
        let healthy = tracker.health().is_ok() && tracker.counters().flows == flows;
        if events() == before && healthy {
            return;
        }
    }
}

async fn measure(flows: u32) {
    let setup = "ip link set lo up && nft 'add table inet t; \
                 add chain inet t c { type filter hook prerouting priority 0; }; \
                 add rule inet t c ct state new counter'";
    assert!(
        Command::new("sh")
            .args(["-c", setup])
            .status()
            .unwrap()
            .success()
    );
    let observer = Observer::open(Options::default()).await.unwrap();
    let base = memory("VmRSS:");
    let tracker = Tracker::start(observer, TrackerOptions::default()).unwrap();
    tracker.in_sync().await.unwrap();
    let handled = || {
        let c = tracker.counters();
        c.new + c.update + c.destroy
    };

    for (what, rate) in [
        ("50,000/s", Some(50_000_u32)),
        ("as fast as possible", None),
    ] {
        let (cpu, begun, before) = (cpu_time(), Instant::now(), tracker.counters());
        let sender = std::thread::spawn(move || {
            pin(1);
            let socket = socket(AddressFamily::NETLINK, SocketType::RAW, Some(NETFILTER)).unwrap();
            let begun = Instant::now();
            let mut sent = 0_u32;
            let all: Vec<u32> = (0..flows).collect();
            for forget in [false, true] {
                for some in all.chunks(50) {
                    let message = |n: &u32| match forget {
                        false => encode::create(&connection(*n), 3, 6000),
                        true => encode::delete(&connection(*n)),
                    };
                    send(&socket, &some.iter().map(message).collect::<Vec<_>>());
                    sent += u32::try_from(some.len()).unwrap();
                    if let Some(rate) = rate {
                        let due = Duration::from_secs_f64(f64::from(sent) / f64::from(rate));
                        std::thread::sleep(due.saturating_sub(begun.elapsed()));
                    }
                }
            }
            begun.elapsed()
        });
        settled(&tracker, 0, handled).await;
        while !sender.is_finished() {
            settled(&tracker, 0, handled).await;
        }
        let sending = sender.join().unwrap();
        let (cpu, counters) = (cpu_time() - cpu, tracker.counters());
        let events = counters.new + counters.destroy - before.new - before.destroy;
        println!(
            "{what}: {} changes made in {sending:.2?} ({:.0}/s), {events} events heard, \
             {} overflows, {} resyncs; {cpu:.2?} of one core ({:.0} events per core second); {:.2?} in all",
            2 * flows,
            f64::from(2 * flows) / sending.as_secs_f64(),
            counters.overflows - before.overflows,
            counters.resyncs - before.resyncs,
            events as f64 / cpu.as_secs_f64(),
            begun.elapsed(),
        );
    }

    let socket = socket(AddressFamily::NETLINK, SocketType::RAW, Some(NETFILTER)).unwrap();
    for n in 0..flows {
        send(&socket, &[encode::create(&connection(n), 3, 6000)]);
        if n % 100 == 0 {
            tokio::task::yield_now().await;
        }
    }
    settled(&tracker, flows.into(), handled).await;
    let heard = memory("VmRSS:");
    tracker.resync().await.unwrap();
    let counters = tracker.counters();
    println!(
        "{} flows known: {} KiB more than before the tracker, {} KiB in all at most; resync {:.2?}",
        counters.flows,
        heard - base,
        memory("VmHWM:"),
        counters.last_resync
    );
    looks(&observer).await;
}

/// What is looked at around each standby: the flows of one guest, among all of them.
async fn looks(observer: &Observer) {
    const LOOKS: usize = 21;
    let guest = Ipv4Addr::new(10, 77, 0, 2);
    let mut took = Vec::new();
    let mut flows = Vec::new();
    for _ in 0..LOOKS {
        flows.clear();
        let begun = Instant::now();
        let mut dump = observer.start_dump_to(guest).unwrap();
        while dump.next(&mut flows).await.unwrap() {}
        took.push(begun.elapsed());
    }
    took.sort();
    let begun = Instant::now();
    let all = observer.dump(Family::Ipv4).await.unwrap().len();
    println!(
        "a look at one guest's {} flows: median {:.2?}, worst {:.2?}; at all {all}: {:.2?}",
        flows.len(),
        took[LOOKS / 2],
        took[LOOKS - 1],
        begun.elapsed(),
    );
}

fn main() {
    let flows = std::env::args()
        .nth(1)
        .and_then(|n| n.parse().ok())
        .unwrap_or(200_000);
    pin(0);
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap()
        .block_on(measure(flows));
}
