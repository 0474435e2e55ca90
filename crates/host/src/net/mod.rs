//! The network of one server: a bridge, a persistent TAP per instance, and an nftables table of our own.
//! Works the same inside a network namespace. Nothing outside our table and links is touched.
//!
//! ```text
//!      guest A        guest B
//!         |              |         virtio-net in the VMM, which opens the TAP by name
//!      tap dz-a       tap dz-b     isolated, learning off, flood off, no IPv6
//!         |    no  ...   |
//!       +-+--- bridge ---+-+       gateway address, fixed MAC, static entry MAC -> TAP
//!       |   host's stack   |       nftables: see ruleset.rs
//!       +--------+---------+
//!                | masquerade
//!            the world
//! ```
//!
//! Invariants:
//! - A TAP's anti-spoofing rules exist before it is a port, and it is isolated before it is up.
//! - A TAP that is not a port yet is down, so that nothing its guest sends gets anywhere; its alias tells from
//!   which bridge it is kept, so that no other server takes it for its own.
//! - [`Network::ensure`] on a running server's network is one atomic change of the rules it owns:
//!   no moment in which guests are cut off or not isolated.
//! - Everything is idempotent, so a call that was cut off is mended by making it again.
//!
//! What we cannot give: where another table drops forwarded traffic (a container engine that sets
//! the policy of its `FORWARD` chain to drop), our `accept` does not override it, because nftables asks every
//! table. The operator has to let the bridge through there. And a `nft flush ruleset` by others takes our table
//! along: until [`Network::ensure`] and [`Network::ensure_tap`] are called again only the ports' isolation is left.
use std::{net::Ipv4Addr, os::fd::OwnedFd, sync::Arc};

use serde::{Deserialize, Serialize};
use tokio::sync::Mutex;

mod links;
mod names;
mod nft;
mod ruleset;
mod subnet;
mod sysctl;
mod tap_info;
mod tun;

use links::{Kind, Link, Links};
use names::{Base, LinkName, Port};
pub use subnet::{PREFIXES, Subnet, SubnetError};
use tap_info::TapInfo;

#[derive(Debug, Clone)]
pub struct NetworkConfig {
    /// A link name: 1 to 15 characters of `[a-z0-9-]`.
    pub bridge: String,
    /// Prefix 8 to 30.
    pub subnet: Subnet,
    /// The bridge's own address, the guests' gateway (first host of the subnet by default).
    pub gateway: Ipv4Addr,
    /// Name of our nftables table (family inet and bridge): 1 to 31 characters of `[A-Za-z0-9_-]`,
    /// starting with a letter.
    pub table: String,
    /// Let guests open connections to the host itself. Off by default.
    pub guest_to_host: bool,
}

/// What belongs to one instance.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TapConfig {
    /// A link name: 1 to 15 characters of `[a-z0-9-]`.
    pub tap: String,
    /// Stored in the link's alias; the full instance id. 1 to 239 bytes without '/'.
    pub alias: String,
    /// The guest's MAC, for example `02:00:0a:4d:00:02`.
    pub mac: String,
    /// The guest's address: a host of the subnet, not the gateway.
    pub ip: Ipv4Addr,
    /// User id that may open the TAP besides root.
    pub owner: Option<u32>,
}

/// Handle to the kernel's link and nftables configuration. It holds no connection and no state of
/// the kernel's; what it knows it asks each time.
#[derive(Debug, Clone)]
pub struct Network {
    config: NetworkConfig,
    base: Base,
    /// One nft transaction at a time, so that ours do not make each other start again.
    transaction: Arc<Mutex<()>>,
}

#[derive(Debug, thiserror::Error)]
pub enum NetError {
    /// A privilege, a kernel feature or a program is missing.
    #[error("{what}; {mend}")]
    Missing { what: String, mend: String },
    /// Everything else: `context` is the step or the refused field, `message` the reason.
    #[error("{context}: {message}")]
    Failed { context: String, message: String },
}

impl Network {
    /// Makes bridge, address, forwarding and the base ruleset as configured, idempotently.
    ///
    /// Guests that are running keep running, isolated, throughout. Another address on the bridge,
    /// from a former configuration, is removed.
    ///
    /// # Errors
    /// A refused field of the configuration; a bridge of that name that is not ours; what the
    /// kernel or nft refuses. Call it again after mending.
    pub async fn ensure(config: NetworkConfig) -> Result<Self, NetError> {
        let base = Base::new(&config)?;
        let network = Self {
            config,
            base,
            transaction: Arc::default(),
        };
        network.ensure_bridge_link().await?;
        // Rules before routing and before the bridge is up: it is never open.
        network
            .apply("installing the base ruleset", &ruleset::base(&network.base))
            .await?;
        sysctl::enable_forwarding()?;
        network.ensure_bridge_up().await?;
        Ok(network)
    }

    /// Marks the bridge as the one of `owner` (1 to 255 bytes, the same at every start of one server), so that two
    /// servers of one host never take each other's TAPs for leftovers.
    ///
    /// # Errors
    /// [`NetError::Failed`] naming the other owner when the bridge has one.
    pub async fn claim(&self, owner: &str) -> Result<(), NetError> {
        Links::run(async |links| {
            let bridge = self.bridge(&links).await?;
            if bridge.alias == owner {
                return Ok(());
            }
            if !bridge.alias.is_empty() {
                let name = &self.base.bridge;
                return Err(NetError::Failed {
                    context: format!("the bridge {name}"),
                    message: format!(
                        "it belongs to another doze server ({}); set [network] bridge to another name, or, \
                         when that server is gone for good, run: ip link delete {name}",
                        bridge.alias
                    ),
                });
            }
            links.set_alias(bridge.index, owner).await
        })
        .await
    }

    async fn ensure_bridge_link(&self) -> Result<(), NetError> {
        let Base {
            bridge, bridge_mac, ..
        } = &self.base;
        Links::run(async |links| {
            if links.find(bridge).await?.is_none() {
                links.add_bridge(bridge, *bridge_mac).await?;
            }
            let link = self.bridge(&links).await?;
            links.shape_bridge(link.index).await
        })
        .await?;
        sysctl::disable_ipv6(bridge)?;
        sysctl::harden_bridge(bridge)
    }

    async fn ensure_bridge_up(&self) -> Result<(), NetError> {
        let Base {
            gateway, subnet, ..
        } = self.base;
        Links::run(async |links| {
            let bridge = self.bridge(&links).await?;
            links
                .set_address(bridge.index, gateway, subnet.prefix)
                .await?;
            links.set_up(bridge.index).await
        })
        .await
    }

    pub fn config(&self) -> &NetworkConfig {
        &self.config
    }

    /// Whether our rules are there. With them the kernel tracks connections; somebody may have flushed them.
    ///
    /// # Errors
    /// That they are not, or that nft cannot tell.
    pub async fn check_rules(&self) -> Result<(), NetError> {
        self.apply("looking for our rules", &ruleset::look(&self.base))
            .await
    }

    /// Creates the TAP on the bridge (port isolated, anti-spoofing for its MAC and IP), idempotently.
    ///
    /// Calls for different TAPs may run at the same time. For a TAP that exists, also while a VMM
    /// has it open, the given MAC, IP and alias apply afterwards and the bridge sends the MAC's frames to this
    /// TAP, wherever it sent them before.
    ///
    /// # Errors
    /// A refused field; a link of that name that is not a TAP of ours, or another instance's (by its
    /// alias); what the kernel or nft refuses. A TAP may be left half-made: call it again or
    /// [`delete_tap`](Self::delete_tap).
    pub async fn ensure_tap(&self, tap: &TapConfig) -> Result<(), NetError> {
        let port = Port::new(tap, &self.base)?;
        let rules = ruleset::add_port(&self.base, &port);
        self.apply("installing the TAP's rules", &rules).await?;
        Links::run(async |links| {
            let bridge = self.bridge(&links).await?;
            let link = self.ensure_tap_link(&links, &port, &bridge).await?;
            sysctl::disable_ipv6(&port.tap)?;
            links.enslave(link.index, bridge.index).await?;
            // As a port it is known by its bridge; until then, by the alias it had.
            links.set_alias(link.index, &port.alias).await?;
            links.isolate(link.index).await?;
            links.set_forwarding(link.index, port.mac).await?;
            links.set_up(link.index).await
        })
        .await
    }

    /// Creates the TAP for a guest that must not reach the network yet, because it wakes with the addresses of
    /// another one: a VMM can open it, its rules are there, but it is down and no port of the bridge. Idempotent;
    /// a TAP that is attached is detached. [`ensure_tap`](Self::ensure_tap) attaches it, also while a VMM has it
    /// open.
    ///
    /// # Errors
    /// As [`ensure_tap`](Self::ensure_tap).
    pub async fn ensure_tap_detached(&self, tap: &TapConfig) -> Result<(), NetError> {
        let port = Port::new(tap, &self.base)?;
        let rules = ruleset::add_port(&self.base, &port);
        self.apply("installing the TAP's rules", &rules).await?;
        Links::run(async |links| {
            let bridge = self.bridge(&links).await?;
            let link = self.ensure_tap_link(&links, &port, &bridge).await?;
            sysctl::disable_ipv6(&port.tap)?;
            links.set_down(link.index).await?;
            links.set_alias(link.index, &port.detached_alias).await?;
            // Its forwarding entries go with it.
            links.release(link.index).await
        })
        .await
    }

    async fn ensure_tap_link(
        &self,
        links: &Links,
        port: &Port,
        bridge: &Link,
    ) -> Result<Link, NetError> {
        let refuse = |message: String| NetError::Failed {
            context: format!("the TAP {}", port.tap),
            message,
        };
        if let Some(link) = links.find(&port.tap).await? {
            let info = self.own_tap(&link, Some(bridge.index))?;
            let (holder, us) = (self.base.instance_of(&link.alias), &port.alias);
            if !holder.is_empty() && holder != us {
                return Err(refuse(format!(
                    "it belongs to the instance {holder}, not to {us}; delete one of the two"
                )));
            }
            if info.packet_info || info.multi_queue || !info.vnet_header {
                return Err(refuse(format!(
                    "it was not made by doze (want no packet info, one queue, a vnet header); \
                     run: ip link delete {}",
                    port.tap
                )));
            }
            // Opening it is needed, and possible while no VMM has it, only to change these two.
            if info.persistent && info.owner == Some(port.owner.unwrap_or(tun::ROOT)) {
                return Ok(link);
            }
        }
        let unkept = tun::make(&port.tap, port.owner)?;
        let made = links.find(&port.tap).await?;
        let made = made.ok_or_else(|| refuse("it vanished as soon as it was made".into()))?;
        // Before it can outlive us: what a crash leaves behind says whose it is.
        if made.alias.is_empty() {
            links.set_alias(made.index, &port.detached_alias).await?;
        }
        unkept.keep(&port.tap)?;
        Ok(made)
    }

    /// Removes the TAP and its rules; absent is fine. A VMM that still has it open loses it.
    ///
    /// # Errors
    /// A link of that name that is not a TAP of ours is left alone.
    pub async fn delete_tap(&self, tap: &str) -> Result<(), NetError> {
        let name = LinkName::new("tap", tap)?;
        // The link first: a guest is never there without its rules.
        Links::run(async |links| {
            let Some(link) = links.find(&name).await? else {
                return Ok(());
            };
            // Without our bridge only a TAP that is nobody's port can be ours.
            let bridge = match links.find(&self.base.bridge).await? {
                Some(_) => Some(self.bridge(&links).await?.index),
                None => None,
            };
            self.own_tap(&link, bridge)?;
            links.delete(link.index).await
        })
        .await?;
        let rules = ruleset::delete_port(&self.base, &name);
        self.apply("removing the TAP's rules", &rules).await
    }

    /// TAPs on our bridge, and those that are kept from it, with their instance (the alias they were given), for
    /// reconciling at start-up.
    ///
    /// # Errors
    /// When the kernel refuses, or the bridge is absent or not ours: then nothing is known.
    pub async fn list_taps(&self) -> Result<Vec<(String, String)>, NetError> {
        Links::run(async |links| {
            let bridge = self.bridge(&links).await?;
            let ours = |link: &Link| {
                matches!(link.kind, Kind::Tap(_))
                    && match link.master {
                        Some(master) => master == bridge.index,
                        None => self.base.is_detached(&link.alias),
                    }
            };
            Ok(links
                .all()
                .await?
                .into_iter()
                .filter(ours)
                .map(|tap| (tap.name, self.base.instance_of(&tap.alias).to_owned()))
                .collect())
        })
        .await
    }

    /// Our bridge, known by its MAC: joining guests to a bridge that somebody made for his own
    /// network would put them there, and change its settings under him.
    async fn bridge(&self, links: &Links) -> Result<Link, NetError> {
        let Base {
            bridge, bridge_mac, ..
        } = &self.base;
        let refuse = |message: String| NetError::Failed {
            context: format!("the bridge {bridge}"),
            message,
        };
        let link = links
            .find(bridge)
            .await?
            .ok_or_else(|| refuse("it does not exist any more; restart the server".into()))?;
        if link.kind != Kind::Bridge || link.mac != Some(*bridge_mac) {
            return Err(refuse(format!(
                "a link of that name exists and was not made by doze (whose bridge has the address {bridge_mac}); \
                 set network.bridge to another name, or run: ip link delete {bridge}"
            )));
        }
        Ok(link)
    }

    /// A TAP is ours as a port of our bridge, or of none unless another server keeps it for its own bridge.
    fn own_tap(&self, link: &Link, bridge: Option<u32>) -> Result<TapInfo, NetError> {
        let ours = match link.master {
            Some(_) => link.master == bridge,
            None => !names::is_detached_from_any(&link.alias) || self.base.is_detached(&link.alias),
        };
        match link.kind {
            Kind::Tap(info) if ours => Ok(info),
            _ => Err(NetError::Failed {
                context: format!("the TAP {}", link.name),
                message: format!(
                    "a link of that name exists and is not a TAP on the bridge {}; it is left alone, remove it by hand",
                    self.base.bridge
                ),
            }),
        }
    }

    async fn apply(&self, context: &str, rules: &str) -> Result<(), NetError> {
        let _one_at_a_time = self.transaction.lock().await;
        nft::apply(context, rules).await
    }
}

/// Opens a TAP as its guest's side: what is read was sent to the guest, what is written the guest
/// sends. Each frame has a `virtio_net_hdr` of 10 bytes before it. A TAP that does not exist is made, and
/// vanishes with the descriptor.
///
/// # Errors
/// A refused name; a TAP that another process has open; a missing privilege or /dev/net/tun.
pub fn open_tap(tap: &str) -> Result<OwnedFd, NetError> {
    tun::attach(&LinkName::new("tap", tap)?)
}

fn privilege(to_do: &str) -> NetError {
    NetError::Missing {
        what: format!("the privilege to {to_do} is missing"),
        mend: "run the server as root, or with the capability CAP_NET_ADMIN".into(),
    }
}
