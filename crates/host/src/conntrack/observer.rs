//! Dumps of the kernel's table, and the stream of its changes.
use std::{fs, io, net::Ipv4Addr, time::Duration};

use tokio::time::Instant;

use super::{
    ConntrackError,
    classify::TcpTimeouts,
    flow::{Family, Flow},
    socket::{DATAGRAM, ReceiveError, Received, Socket},
    wire::{self, Kind, Malformed, Message, Messages, Usage, Wanted},
};

/// Masks of `NFNLGRP_CONNTRACK_NEW`, `_UPDATE` and `_DESTROY` (groups 1, 2, 3).
const GROUPS: u32 = 0b111;
const SEQUENCE: u32 = 1;
/// A dump's datagrams are made while we receive, so a kernel that answers at all answers at once.
const PATIENCE: Duration = Duration::from_secs(30);
/// At most so many events are handed over at once.
const BATCH: usize = 512;
/// Between attempts to open the socket again: doubled from the first to the last.
const FIRST_RETRY: Duration = Duration::from_millis(100);
const LAST_RETRY: Duration = Duration::from_secs(10);

/// What to observe. By default TCP over IPv4.
#[derive(Debug, Clone, Copy)]
pub struct Options {
    pub ipv6: bool,
    pub udp: bool,
    /// Bytes of events that may wait in the kernel, by its own count, which includes its
    /// bookkeeping: about 1 KiB per event. Beyond `net.core.rmem_max` only with `CAP_NET_ADMIN`;
    /// less is given silently otherwise. The kernel doubles it.
    pub receive_buffer: usize,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            ipv6: false,
            udp: false,
            receive_buffer: 16 * 1024 * 1024,
        }
    }
}

impl Options {
    /// The families to dump, in order.
    pub fn families(&self) -> impl Iterator<Item = Family> + use<> {
        [Family::Ipv4]
            .into_iter()
            .chain(self.ipv6.then_some(Family::Ipv6))
    }

    fn wanted(&self) -> Wanted {
        Wanted {
            ipv4: true,
            ipv6: self.ipv6,
            udp: self.udp,
        }
    }
}

/// The way to the connection tracking of the network namespace it was opened in.
#[derive(Debug, Clone, Copy)]
pub struct Observer {
    options: Options,
}

impl Observer {
    /// Asks the kernel whether it tracks connections and lets us look; opens nothing that stays.
    ///
    /// # Errors
    /// [`ConntrackError::Unsupported`] and [`ConntrackError::Permission`], which say how to mend.
    pub async fn open(options: Options) -> Result<Self, ConntrackError> {
        let observer = Self { options };
        observer.usage().await?;
        // A request needs less than a subscription in some containers.
        observer.events().map(drop)?;
        Ok(observer)
    }

    pub fn options(&self) -> Options {
        self.options
    }

    /// # Errors
    /// As [`Observer::open`].
    pub async fn usage(&self) -> Result<Usage, ConntrackError> {
        const DOING: &str = "asking how full the table of connections is";
        let socket = Socket::open(0, None)?;
        socket.send(&wire::request(wire::CT_GET_STATS, 0, SEQUENCE, None), DOING)?;
        let mut buffer = vec![0; DATAGRAM];
        let waiting = socket.receive(&mut buffer);
        let Ok(received) = tokio::time::timeout(PATIENCE, waiting).await else {
            return Err(ConntrackError::Kernel {
                doing: DOING,
                errno: rustix::io::Errno::TIMEDOUT,
            });
        };
        let length = datagram(received, DOING)?;
        let answer = Messages(buffer.get(..length).unwrap_or_default()).next();
        let message = answer.ok_or(Malformed::Missing("message"))??;
        if message.kind == wire::NLMSG_ERROR {
            refused(&message, DOING)?;
        }
        Ok(wire::usage(message.payload)?)
    }

    /// All flows of one family, as they were at some moment between call and return each.
    ///
    /// # Errors
    /// Any [`ConntrackError`]; what was read until then is dropped.
    pub async fn dump(&self, family: Family) -> Result<Vec<Flow>, ConntrackError> {
        let mut dump = self.start_dump(family)?;
        let mut flows = Vec::new();
        while dump.next(&mut flows).await? {}
        Ok(flows)
    }

    /// As [`Observer::dump`], piece by piece.
    ///
    /// # Errors
    /// What opening the socket and asking can meet.
    pub fn start_dump(&self, family: Family) -> Result<Dump, ConntrackError> {
        let request = wire::request(wire::CT_GET, wire::NLM_F_DUMP, SEQUENCE, Some(family));
        self.ask_for_dump(family, &request)
    }

    /// As [`Observer::start_dump`], of the flows to this address. A kernel before 5.8 sends all of them.
    ///
    /// # Errors
    /// What opening the socket and asking can meet.
    pub fn start_dump_to(&self, destination: Ipv4Addr) -> Result<Dump, ConntrackError> {
        let request = wire::request_to(SEQUENCE, destination);
        self.ask_for_dump(Family::Ipv4, &request)
    }

    fn ask_for_dump(&self, family: Family, request: &[u8]) -> Result<Dump, ConntrackError> {
        let socket = Socket::open(0, None)?;
        socket.send(request, "asking for the table of connections")?;
        Ok(Dump {
            socket,
            family,
            wanted: Wanted {
                ipv4: true,
                ipv6: true,
                udp: self.options.udp,
            },
            buffer: vec![0; DATAGRAM],
        })
    }

    /// Subscribes: from here on no change is missed without an [`Event::Lost`].
    ///
    /// By default (`net.netfilter.nf_conntrack_events` = 2) the kernel gives a flow the means to
    /// send events only if somebody on the host is subscribed when the flow begins: of older flows
    /// nothing is heard, their end included. Only a dump tells. They can only be kept too long: a
    /// client that comes back is a new flow.
    ///
    /// # Errors
    /// What opening and subscribing can meet.
    pub fn events(&self) -> Result<Events, ConntrackError> {
        Ok(Events {
            link: Link::Up(self.subscribe()?),
            observer: *self,
            buffer: vec![0; DATAGRAM],
            ignored: 0,
        })
    }

    fn subscribe(&self) -> Result<Socket, ConntrackError> {
        Socket::open(GROUPS, Some(self.options.receive_buffer))
    }

    /// The timeouts that tell how long an established flow has been idle.
    ///
    /// # Errors
    /// [`ConntrackError::Unsupported`] where the settings do not exist or are no numbers.
    pub fn tcp_timeouts(&self) -> Result<TcpTimeouts, ConntrackError> {
        Ok(TcpTimeouts {
            established: setting("nf_conntrack_tcp_timeout_established")?,
            unacknowledged: setting("nf_conntrack_tcp_timeout_unacknowledged")?,
            max_retransmissions: setting("nf_conntrack_tcp_timeout_max_retrans")?,
        })
    }
}

/// Seconds.
fn setting(name: &str) -> Result<u32, ConntrackError> {
    const DOING: &str = "reading the timeouts of connection tracking below /proc/sys/net/netfilter";
    let failed = |e: io::Error| match e.kind() {
        io::ErrorKind::NotFound => ConntrackError::Unsupported(rustix::io::Errno::NOENT),
        _ => ConntrackError::from_errno(
            DOING,
            rustix::io::Errno::from_io_error(&e).unwrap_or(rustix::io::Errno::IO),
        ),
    };
    let text = fs::read_to_string(format!("/proc/sys/net/netfilter/{name}")).map_err(failed)?;
    text.trim().parse().map_err(|_| ConntrackError::Kernel {
        doing: DOING,
        errno: rustix::io::Errno::RANGE,
    })
}

fn datagram(
    received: Result<Received, ReceiveError>,
    doing: &'static str,
) -> Result<usize, ConntrackError> {
    match received.map_err(|e| e.during(doing))? {
        Received::Datagram(length) => Ok(length),
        Received::Empty => Ok(0),
        Received::Overrun => Err(ConntrackError::Kernel {
            doing,
            errno: rustix::io::Errno::NOBUFS,
        }),
    }
}

fn refused(message: &Message<'_>, doing: &'static str) -> Result<(), ConntrackError> {
    match message.errno()? {
        0 => Ok(()),
        errno => Err(ConntrackError::from_errno(
            doing,
            rustix::io::Errno::from_raw_os_error(errno),
        )),
    }
}

/// A dump under way. Dropping it ends it.
#[derive(Debug)]
pub struct Dump {
    socket: Socket,
    family: Family,
    wanted: Wanted,
    buffer: Vec<u8>,
}

impl Dump {
    /// Appends some flows; `false` when the dump is complete. Cancelling loses nothing.
    ///
    /// # Errors
    /// Any [`ConntrackError`]; the dump is over then, and what it gave is incomplete.
    pub async fn next(&mut self, flows: &mut Vec<Flow>) -> Result<bool, ConntrackError> {
        const DOING: &str = "reading the table of connections";
        let waiting = self.socket.receive(&mut self.buffer);
        let Ok(received) = tokio::time::timeout(PATIENCE, waiting).await else {
            return Err(ConntrackError::Stalled {
                family: self.family,
                seconds: PATIENCE.as_secs(),
            });
        };
        let length = datagram(received, DOING)?;
        for message in Messages(self.buffer.get(..length).unwrap_or_default()) {
            let message = message?;
            if message.sequence != SEQUENCE {
                continue;
            }
            if message.flags & wire::NLM_F_DUMP_INTR != 0 {
                return Err(ConntrackError::Interrupted(self.family));
            }
            match message.kind {
                wire::NLMSG_DONE | wire::NLMSG_ERROR => {
                    refused(&message, DOING)?;
                    return Ok(false);
                }
                wire::NLMSG_OVERRUN => return Err(ConntrackError::Interrupted(self.family)),
                wire::CT_NEW => flows.extend(wire::flow(message.payload, self.wanted)?),
                _ => {}
            }
        }
        Ok(true)
    }
}

/// A change in the kernel's table.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Event {
    New(Flow),
    /// Its [`Flow::state`] is `None` if the change is about something else.
    Update(Flow),
    Destroy(Flow),
    /// Changes were missed. What is known is not the truth until a dump begun after this.
    Lost(Lost),
}

/// Why changes were missed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Lost {
    /// We read too slowly for the socket's buffer (`ENOBUFS`). What was queued has been dropped.
    Overflow,
    /// A message could not be read.
    Malformed(Malformed),
    /// The subscription is gone; nothing is heard until [`Lost::Reconnected`].
    Disconnected(ConntrackError),
    /// There is a subscription again.
    Reconnected,
}

/// A subscription, opened again by itself after trouble.
#[derive(Debug)]
pub struct Events {
    link: Link,
    observer: Observer,
    buffer: Vec<u8>,
    ignored: u64,
}

#[derive(Debug)]
enum Link {
    Up(Socket),
    /// A moment and no duration: waiting for it may be cancelled and begun again as often as one likes.
    Down {
        at: Instant,
        retry: Duration,
    },
}

impl Link {
    fn down(retry: Duration) -> Link {
        let at = Instant::now() + retry;
        Link::Down { at, retry }
    }
}

impl Events {
    /// The next event. Use [`Events::next_batch`] where there are many.
    pub async fn next(&mut self) -> Event {
        let mut one = Vec::with_capacity(1);
        loop {
            self.fill(&mut one, 1).await;
            if let Some(event) = one.pop() {
                return event;
            }
        }
    }

    /// As a stream that never ends.
    pub fn into_stream(self) -> impl futures::Stream<Item = Event> {
        futures::stream::unfold(self, async |mut events| Some((events.next().await, events)))
    }

    /// Waits for events and appends those that are there, some hundred at most. Cancelling loses
    /// nothing.
    pub async fn next_batch(&mut self, events: &mut Vec<Event>) {
        self.fill(events, BATCH).await;
    }

    /// How many messages were about flows that [`Options`] does not select.
    pub fn ignored(&self) -> u64 {
        self.ignored
    }

    /// The size of the socket's buffer that the kernel granted, `None` while disconnected.
    ///
    /// # Errors
    /// What getsockopt(2) meets.
    pub fn receive_buffer(&self) -> Result<Option<usize>, ConntrackError> {
        match &self.link {
            Link::Up(socket) => socket.receive_buffer().map(Some),
            Link::Down { .. } => Ok(None),
        }
    }

    async fn fill(&mut self, events: &mut Vec<Event>, most: usize) {
        let full = events.len() + most;
        let mut received = match &self.link {
            Link::Up(socket) => socket.receive(&mut self.buffer).await,
            Link::Down { at, .. } => {
                tokio::time::sleep_until(*at).await;
                events.extend(self.reconnect());
                return;
            }
        };
        // From here on nothing waits, so nothing that was received can be lost by cancelling.
        loop {
            match received {
                Ok(Received::Datagram(length)) => self.parse(length, events),
                Ok(Received::Empty) => return,
                Ok(Received::Overrun) => match self.drain() {
                    Ok(()) => return events.push(Event::Lost(Lost::Overflow)),
                    Err(error) => return events.push(self.disconnect(error)),
                },
                Err(error) => return events.push(self.disconnect(error)),
            }
            let Link::Up(socket) = &self.link else { return };
            if events.len() >= full {
                return;
            }
            received = socket.try_receive(&mut self.buffer);
        }
    }

    fn parse(&mut self, length: usize, events: &mut Vec<Event>) {
        let wanted = self.observer.options.wanted();
        for message in Messages(self.buffer.get(..length).unwrap_or_default()) {
            let read = message.map(|m| (m.event(), m.kind, wire::flow(m.payload, wanted)));
            let event = match read {
                Ok((Kind::Other, wire::NLMSG_OVERRUN, _)) => Event::Lost(Lost::Overflow),
                Ok((Kind::Other, ..)) => continue,
                Ok((_, _, Ok(None))) => {
                    self.ignored += 1;
                    continue;
                }
                Ok((Kind::New, _, Ok(Some(flow)))) => Event::New(flow),
                Ok((Kind::Update, _, Ok(Some(flow)))) => Event::Update(flow),
                Ok((Kind::Destroy, _, Ok(Some(flow)))) => Event::Destroy(flow),
                Ok((_, _, Err(malformed))) | Err(malformed) => {
                    Event::Lost(Lost::Malformed(malformed))
                }
            };
            events.push(event);
        }
    }

    /// Empties the queue after an overflow.
    ///
    /// Until the queue has been empty once, the kernel drops every further message and reports none
    /// of that (`NETLINK_S_CONGESTED`, net/netlink/af_netlink.c): a dump begun earlier would be
    /// followed by a silent gap. What is in the queue is older than the coming dump.
    fn drain(&mut self) -> Result<(), ReceiveError> {
        let Link::Up(socket) = &self.link else {
            return Ok(());
        };
        // No queued message counts less than this against the buffer, so after so many the queue
        // has been empty, even if events come as fast as they are dropped here.
        const LEAST_MESSAGE: usize = 256;
        let granted = socket.receive_buffer().unwrap_or(DATAGRAM);
        let whole = granted.max(self.observer.options.receive_buffer) / LEAST_MESSAGE + 1;
        let mut left = whole;
        while left > 0 {
            match socket.try_receive(&mut self.buffer) {
                Ok(Received::Empty) => return Ok(()),
                Ok(Received::Overrun) => left = whole,
                Ok(Received::Datagram(_)) | Err(ReceiveError::Malformed(_)) => left -= 1,
                Err(error @ ReceiveError::Errno(_)) => return Err(error),
            }
        }
        Ok(())
    }

    fn disconnect(&mut self, error: ReceiveError) -> Event {
        match error {
            ReceiveError::Malformed(malformed) => Event::Lost(Lost::Malformed(malformed)),
            ReceiveError::Errno(_) => {
                let error = error.during("receiving events of connection tracking");
                self.link = Link::down(FIRST_RETRY);
                Event::Lost(Lost::Disconnected(error))
            }
        }
    }

    fn reconnect(&mut self) -> Option<Event> {
        let Link::Down { retry, .. } = &self.link else {
            return None;
        };
        let next = (*retry * 2).min(LAST_RETRY);
        match self.observer.subscribe() {
            Ok(socket) => {
                self.link = Link::Up(socket);
                Some(Event::Lost(Lost::Reconnected))
            }
            Err(error) => {
                self.link = Link::down(next);
                Some(Event::Lost(Lost::Disconnected(error)))
            }
        }
    }

    /// Closes the socket as if receiving from it had failed, which no test can make the kernel do; it is
    /// opened again after `retry`.
    #[doc(hidden)]
    pub fn cut(&mut self, retry: Duration) -> Event {
        let event = self.disconnect(ReceiveError::Errno(rustix::io::Errno::CONNRESET));
        self.link = Link::down(retry);
        event
    }
}
