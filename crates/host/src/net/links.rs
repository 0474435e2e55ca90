//! Links, addresses and forwarding entries by rtnetlink (rtnetlink(7)).
//!
//! A connection lives as long as one operation: nothing runs in the background, nothing has to be
//! repaired after an error, and the namespace is that of the caller.
use std::{future::Future, net::Ipv4Addr, time::Duration};

use futures::{StreamExt, TryStreamExt};
use rtnetlink::{
    Handle, LinkBridge, LinkBridgePort, LinkMessageBuilder, LinkUnspec,
    packet_core::{NLM_F_DUMP, NLM_F_DUMP_INTR, NLM_F_REQUEST, NetlinkMessage, NetlinkPayload},
    packet_route::{
        AddressFamily, RouteNetlinkMessage,
        address::AddressAttribute,
        link::{
            BridgeStpState, InfoBridge, InfoData, InfoKind, LinkAttribute, LinkInfo, LinkMessage,
        },
        neighbour::{NeighbourAttribute, NeighbourFlags, NeighbourState},
    },
};

use super::{
    NetError,
    names::{LinkName, Mac},
    privilege,
    tap_info::TapInfo,
};

/// An operation is a few messages of microseconds each; the kernel answers late only when it hangs.
const TIMEOUT: Duration = Duration::from_secs(30);
/// How often a listing is begun anew when links come and go meanwhile.
const LISTINGS: u32 = 20;

/// What doze wants to know about a link.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Link {
    pub(super) index: u32,
    pub(super) name: String,
    pub(super) alias: String,
    pub(super) mac: Option<Mac>,
    /// Index of the bridge it is a port of.
    pub(super) master: Option<u32>,
    pub(super) kind: Kind,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    Bridge,
    Tap(TapInfo),
    Other,
}

/// An open rtnetlink connection.
pub(super) struct Links(Handle);

impl Links {
    /// Opens a connection, runs the operation on it, closes it.
    pub(super) async fn run<T, F>(operation: impl FnOnce(Self) -> F) -> Result<T, NetError>
    where
        F: Future<Output = Result<T, NetError>>,
    {
        let closed = |message: String| NetError::Failed {
            context: "talking rtnetlink to the kernel".into(),
            message,
        };
        let (connection, handle, _) =
            rtnetlink::new_connection().map_err(|e| closed(e.to_string()))?;
        tokio::select! {
            outcome = operation(Self(handle)) => outcome,
            () = connection => Err(closed("the connection was closed".into())),
            () = tokio::time::sleep(TIMEOUT) => {
                Err(closed(format!("no answer within {} s", TIMEOUT.as_secs())))
            }
        }
    }

    /// The link of that name, if there is one.
    pub(super) async fn find(&self, name: &LinkName) -> Result<Option<Link>, NetError> {
        let request = self.0.link().get().match_name(name.as_str());
        let mut answers = std::pin::pin!(request.execute());
        match answers.try_next().await {
            Ok(answer) => Ok(answer.map(Link::from)),
            Err(e) if is(&e, libc::ENODEV) => Ok(None),
            Err(e) => Err(failed(format!("looking for the link {name}"), &e)),
        }
    }

    /// All links. Begun anew until none came or went meanwhile, because a listing that was disturbed may
    /// lack some.
    pub(super) async fn all(&self) -> Result<Vec<Link>, NetError> {
        for _ in 0..LISTINGS {
            if let Some(links) = self.list().await? {
                return Ok(links);
            }
        }
        Err(NetError::Failed {
            context: "listing the links".into(),
            message: format!("links came and went during each of {LISTINGS} attempts; try again"),
        })
    }

    async fn list(&self) -> Result<Option<Vec<Link>>, NetError> {
        let wanted = LinkMessage::default();
        let mut request = NetlinkMessage::from(RouteNetlinkMessage::GetLink(wanted));
        request.header.flags = NLM_F_REQUEST | NLM_F_DUMP;
        let context = "listing the links";
        let mut handle = self.0.clone();
        let mut answers = handle.request(request).map_err(|e| failed(context, &e))?;
        let mut links = Vec::new();
        let mut disturbed = false;
        // To the end in any case: what is left unread would disturb the next request.
        while let Some(answer) = answers.next().await {
            disturbed |= answer.header.flags & NLM_F_DUMP_INTR != 0;
            match answer.payload {
                NetlinkPayload::InnerMessage(RouteNetlinkMessage::NewLink(link)) => {
                    links.push(Link::from(link));
                }
                NetlinkPayload::Error(e) => {
                    return Err(failed(context, &rtnetlink::Error::NetlinkError(e)));
                }
                _ => {}
            }
        }
        Ok((!disturbed).then_some(links))
    }

    /// A bridge that is still down. Its MAC is given at once: one that was set does not change with
    /// the ports, and marks the bridge as ours from its first moment.
    pub(super) async fn add_bridge(&self, name: &LinkName, mac: Mac) -> Result<(), NetError> {
        let message = LinkMessageBuilder::<LinkBridge>::new(name.as_str())
            .address(mac.0.to_vec())
            .build();
        match self.0.link().add(message).execute().await {
            Err(e) if !is(&e, libc::EEXIST) => Err(failed(format!("making the bridge {name}"), &e)),
            _ => Ok(()),
        }
    }

    /// No spanning tree and no delay, so that a port forwards as soon as it is up; no snooping of
    /// multicast groups, which nobody here has.
    pub(super) async fn shape_bridge(&self, index: u32) -> Result<(), NetError> {
        // Two messages: the kernel looks at the delay first, and with a spanning tree refuses zero.
        let first = [InfoBridge::StpState(BridgeStpState::Disabled)];
        let second = [
            InfoBridge::ForwardDelay(0),
            InfoBridge::MulticastSnooping(false),
        ];
        for settings in [first.to_vec(), second.to_vec()] {
            let message = LinkMessageBuilder::<LinkBridge>::new_with_info_kind(InfoKind::Bridge)
                .index(index)
                .set_info_data(InfoData::Bridge(settings))
                .build();
            self.change(message, "setting up the bridge").await?;
        }
        Ok(())
    }

    /// Makes the address the link's only IPv4 address.
    pub(super) async fn set_address(
        &self,
        index: u32,
        address: Ipv4Addr,
        prefix: u8,
    ) -> Result<(), NetError> {
        let context = format!("giving the bridge the address {address}/{prefix}");
        let all: Vec<_> = self
            .0
            .address()
            .get()
            .set_link_index_filter(index)
            .execute()
            .try_collect()
            .await
            .map_err(|e| failed(&context, &e))?;
        let mut present = false;
        for message in all {
            if message.header.family != AddressFamily::Inet {
                continue;
            }
            let is_ours = message.header.prefix_len == prefix
                && message
                    .attributes
                    .contains(&AddressAttribute::Local(address.into()));
            if is_ours {
                present = true;
            } else {
                match self.0.address().del(message).execute().await {
                    Err(e) if !is(&e, libc::EADDRNOTAVAIL) => {
                        return Err(failed("removing the bridge's former address", &e));
                    }
                    _ => {}
                }
            }
        }
        if present {
            return Ok(());
        }
        let request = self.0.address().add(index, address.into(), prefix);
        match request.execute().await {
            Err(e) if !is(&e, libc::EEXIST) => Err(failed(context, &e)),
            _ => Ok(()),
        }
    }

    pub(super) async fn set_alias(&self, index: u32, alias: &str) -> Result<(), NetError> {
        let message = LinkUnspec::new_with_index(index).alias(alias).build();
        self.change(message, "setting a link's alias").await
    }

    /// Makes the TAP a port of the bridge.
    pub(super) async fn enslave(&self, index: u32, bridge: u32) -> Result<(), NetError> {
        let message = LinkUnspec::new_with_index(index).controller(bridge).build();
        self.change(message, "making the TAP a port of the bridge")
            .await
    }

    /// Makes the TAP nobody's port.
    pub(super) async fn release(&self, index: u32) -> Result<(), NetError> {
        let message = LinkUnspec::new_with_index(index).nocontroller().build();
        self.change(message, "taking the TAP off the bridge").await
    }

    /// `isolated`: talks to the bridge itself only, not to other isolated ports. `learning off`, `flood off`:
    /// who is behind the port is told by a static entry, so a guest cannot claim another's MAC.
    pub(super) async fn isolate(&self, index: u32) -> Result<(), NetError> {
        let message = LinkBridgePort::new(index)
            .isolated(true)
            .learning(false)
            .flood(false)
            .hairpin(false)
            .build();
        let context = "isolating the TAP on the bridge";
        self.0
            .link()
            .set_port(message)
            .execute()
            .await
            .map_err(|e| failed(context, &e))
    }

    /// The bridge sends this MAC's frames to this port, wherever it sent them before; the port's
    /// entries for other MACs go.
    pub(super) async fn set_forwarding(&self, port: u32, mac: Mac) -> Result<(), NetError> {
        self.0
            .neighbours()
            .add_bridge(port, &mac.0)
            // "static" in bridge(8): does not age, and is not one of the bridge's own.
            .state(NeighbourState::Noarp)
            .flags(NeighbourFlags::Controller)
            .replace()
            .execute()
            .await
            .map_err(|e| failed(format!("pointing {mac} to its TAP"), &e))?;
        self.forget_others(port, mac).await
    }

    async fn forget_others(&self, port: u32, mac: Mac) -> Result<(), NetError> {
        let context = "listing forwarding entries";
        let entries: Vec<_> = self
            .0
            .neighbours()
            .get()
            .set_address_family(AddressFamily::Bridge)
            .execute()
            .try_collect()
            .await
            .map_err(|e| failed(context, &e))?;
        for entry in entries {
            let others = entry
                .attributes
                .iter()
                .any(|a| matches!(a, NeighbourAttribute::LinkLayerAddress(lla) if *lla != mac.0));
            // Permanent ones are the TAP's own (its host side) and multicast groups.
            let is_static = entry.header.state == NeighbourState::Noarp;
            if entry.header.ifindex != port || !is_static || !others {
                continue;
            }
            match self.0.neighbours().del(entry).execute().await {
                Err(e) if !is(&e, libc::ENOENT) => {
                    return Err(failed("removing a former forwarding entry", &e));
                }
                _ => {}
            }
        }
        Ok(())
    }

    pub(super) async fn set_up(&self, index: u32) -> Result<(), NetError> {
        let message = LinkUnspec::new_with_index(index).up().build();
        self.change(message, "setting the link up").await
    }

    pub(super) async fn set_down(&self, index: u32) -> Result<(), NetError> {
        let message = LinkUnspec::new_with_index(index).down().build();
        self.change(message, "setting the link down").await
    }

    /// Also while a process has the TAP open; gone already is fine.
    pub(super) async fn delete(&self, index: u32) -> Result<(), NetError> {
        match self.0.link().del(index).execute().await {
            Err(e) if !is(&e, libc::ENODEV) => Err(failed("deleting the TAP", &e)),
            _ => Ok(()),
        }
    }

    async fn change(&self, message: LinkMessage, context: &str) -> Result<(), NetError> {
        let request = self.0.link().change(message);
        request.execute().await.map_err(|e| failed(context, &e))
    }
}

impl From<LinkMessage> for Link {
    fn from(message: LinkMessage) -> Self {
        let mut link = Self {
            index: message.header.index,
            name: String::new(),
            alias: String::new(),
            mac: None,
            master: None,
            kind: Kind::Other,
        };
        for attribute in message.attributes {
            match attribute {
                LinkAttribute::IfName(name) => link.name = name,
                LinkAttribute::IfAlias(alias) => link.alias = alias,
                LinkAttribute::Address(bytes) => link.mac = bytes.try_into().ok().map(Mac),
                LinkAttribute::Controller(index) => link.master = Some(index).filter(|i| *i != 0),
                LinkAttribute::LinkInfo(infos) => link.kind = kind(&infos),
                _ => {}
            }
        }
        link
    }
}

fn kind(infos: &[LinkInfo]) -> Kind {
    if infos.contains(&LinkInfo::Kind(InfoKind::Bridge)) {
        return Kind::Bridge;
    }
    infos
        .iter()
        .find_map(|info| match info {
            LinkInfo::Data(InfoData::Tun(data)) => TapInfo::of(data),
            _ => None,
        })
        .map_or(Kind::Other, Kind::Tap)
}

fn is(error: &rtnetlink::Error, errno: i32) -> bool {
    matches!(error, rtnetlink::Error::NetlinkError(e) if e.raw_code() == -errno)
}

fn failed(context: impl Into<String>, error: &rtnetlink::Error) -> NetError {
    let context = context.into();
    match error {
        rtnetlink::Error::NetlinkError(e)
            if [-libc::EPERM, -libc::EACCES].contains(&e.raw_code()) =>
        {
            privilege(&format!("change links ({context})"))
        }
        rtnetlink::Error::NetlinkError(e) => NetError::Failed {
            context,
            message: e.to_io().to_string(),
        },
        other => NetError::Failed {
            context,
            message: other.to_string(),
        },
    }
}
