//! Who talks to an instance: by what the tracker has heard, or by a dump of this moment.
use std::{
    collections::HashSet,
    net::{IpAddr, Ipv4Addr},
};

use doze_host::{
    conntrack::{
        ConntrackError, Counters, Dump, Family, Flow, NotInSync, Observer, Options, Tracker,
        TrackerOptions,
        classify::{self, IdleLimit, Rules, Verdict},
        policy::EnabledPolicy,
    },
    net::Network,
};

use super::decide::Blind;

/// What tells one connection of an instance from another: the kernel's id, and the client's end.
type Connection = (u32, IpAddr, u16, u16);

/// The connections of one instance that its policy does not ignore.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Sight {
    pub active: u64,
    /// Those that are over and that the kernel has not forgotten yet.
    pub over: HashSet<Connection>,
}

/// Our view of this host's connections.
pub struct Eyes {
    observer: Observer,
    tracker: Tracker,
}

impl Eyes {
    /// Begins to observe. The error says what is missing and how to mend it.
    pub async fn open() -> Result<Eyes, String> {
        let observer = Observer::open(Options::default())
            .await
            .map_err(|error| error.to_string())?;
        let tracker = Tracker::start(observer, TrackerOptions::default())
            .map_err(|error| error.to_string())?;
        // What is there already has to be known before anybody is taken for idle.
        if let Err(error) = tracker.resync().await {
            tracing::warn!(%error, "the table of connections could not be read yet; all instances count as busy");
        }
        Ok(Eyes { observer, tracker })
    }

    pub fn tracker(&self) -> &Tracker {
        &self.tracker
    }

    pub fn counters(&self) -> Counters {
        self.tracker.counters()
    }

    /// By what has been heard.
    pub fn known(&self, ip: IpAddr, policy: &EnabledPolicy) -> Result<Sight, Blind> {
        let flows = self.tracker.flows_to(ip).map_err(blind)?;
        let mut sight = Sight::default();
        self.see(&mut sight, &flows, ip, policy);
        Ok(sight)
    }

    /// By a dump begun now.
    pub async fn fresh(&self, ip: Ipv4Addr, policy: &EnabledPolicy) -> Result<Sight, String> {
        match self.read(self.observer.start_dump_to(ip), ip, policy).await {
            Ok(sight) => Ok(sight),
            // The filter may be what the kernel cannot do.
            Err(error) => {
                tracing::debug!(%error, "connections to one address could not be read; reading all");
                let all = self.observer.start_dump(Family::Ipv4);
                self.read(all, ip, policy).await
            }
        }
    }

    async fn read(
        &self,
        dump: Result<Dump, ConntrackError>,
        ip: Ipv4Addr,
        policy: &EnabledPolicy,
    ) -> Result<Sight, String> {
        let mut dump = dump.map_err(|error| error.to_string())?;
        let (mut sight, mut flows) = (Sight::default(), Vec::new());
        loop {
            let more = dump.next(&mut flows).await.map_err(|e| e.to_string())?;
            // Piece by piece: the whole table may be large, and many may look at once.
            self.see(&mut sight, &flows, ip.into(), policy);
            flows.clear();
            if !more {
                return Ok(sight);
            }
        }
    }

    fn see(&self, sight: &mut Sight, flows: &[Flow], ip: IpAddr, policy: &EnabledPolicy) {
        let timeouts = policy.max_flow_idle.map(|_| self.observer.tcp_timeouts());
        let rules = Rules {
            instance: ip,
            ignore_source_cidrs: &policy.ignore_source_cidrs,
            ignore_destination_ports: &policy.ignore_destination_ports,
            // Without them nothing counts as silent for too long.
            max_flow_idle: match (policy.max_flow_idle, timeouts) {
                (Some(longest), Some(Ok(timeouts))) => Some(IdleLimit { longest, timeouts }),
                _ => None,
            },
        };
        for flow in flows {
            match classify::classify(flow, &rules) {
                Verdict::Active => sight.active += 1,
                Verdict::Inactive(classify::Reason::Closed(_)) => {
                    let Flow { id, original, .. } = flow;
                    sight.over.insert((
                        *id,
                        original.source,
                        original.source_port,
                        original.destination_port,
                    ));
                }
                Verdict::Inactive(_) => {}
            }
        }
    }
}

fn blind(error: NotInSync) -> Blind {
    match error {
        NotInSync::Resyncing => Blind::Resyncing,
        NotInSync::Disconnected(_)
        | NotInSync::DumpFailed(_)
        | NotInSync::TooManyFlows(_)
        | NotInSync::Stopped => Blind::Lost(error.to_string()),
    }
}

/// Whether the kernel tracks connections at all, which it does only while some rule asks for it: without
/// ours nobody is seen, and everybody looks idle.
pub async fn is_tracking(network: &Network) -> Result<(), String> {
    network
        .check_rules()
        .await
        .map_err(|error| error.to_string())
}
