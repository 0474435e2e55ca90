//! What the kernel tells about a TAP: the `IFLA_TUN_*` attributes (linux/if_link.h).
use rtnetlink::{packet_core::Nla, packet_route::link::InfoTun};

const OWNER: u16 = 1;
const TYPE: u16 = 3;
const PACKET_INFO: u16 = 4;
const VNET_HEADER: u16 = 5;
const PERSIST: u16 = 6;
const MULTI_QUEUE: u16 = 7;

/// Value of `TYPE` for a TAP; 1 is a TUN.
const TAP: u8 = 2;

#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) struct TapInfo {
    pub(super) owner: Option<u32>,
    pub(super) persistent: bool,
    pub(super) vnet_header: bool,
    pub(super) packet_info: bool,
    pub(super) multi_queue: bool,
}

impl TapInfo {
    /// `None` for a TUN.
    pub(super) fn of(attributes: &[InfoTun]) -> Option<Self> {
        let mut info = Self::default();
        let mut is_tap = false;
        for attribute in attributes {
            let mut bytes = vec![0; attribute.value_len()];
            attribute.emit_value(&mut bytes);
            let set = bytes.first().is_some_and(|byte| *byte != 0);
            match attribute.kind() {
                OWNER => info.owner = bytes.try_into().ok().map(u32::from_ne_bytes),
                TYPE => is_tap = bytes.first() == Some(&TAP),
                PACKET_INFO => info.packet_info = set,
                VNET_HEADER => info.vnet_header = set,
                PERSIST => info.persistent = set,
                MULTI_QUEUE => info.multi_queue = set,
                _ => {}
            }
        }
        is_tap.then_some(info)
    }
}

#[cfg(test)]
mod tests {
    use rtnetlink::packet_core::DefaultNla;

    use super::*;

    fn attribute(kind: u16, value: &[u8]) -> InfoTun {
        InfoTun::Other(DefaultNla::new(kind, value.to_vec()))
    }

    #[test]
    fn a_tap_is_told_from_a_tun() {
        let tap = [
            attribute(TYPE, &[2]),
            attribute(OWNER, &7u32.to_ne_bytes()),
            attribute(VNET_HEADER, &[1]),
            attribute(PERSIST, &[1]),
            attribute(99, &[]),
        ];
        let wanted = TapInfo {
            owner: Some(7),
            persistent: true,
            vnet_header: true,
            ..TapInfo::default()
        };
        assert_eq!(TapInfo::of(&tap), Some(wanted));
        assert_eq!(TapInfo::of(&[attribute(TYPE, &[1])]), None);
        assert_eq!(TapInfo::of(&[]), None);
    }
}
