//! What can go wrong between us and the kernel's connection tracking, and how to mend it.
use rustix::io::Errno;

use super::{flow::Family, wire::Malformed};

/// Why connections cannot be observed, or one observation failed. Cheap to copy: everybody who waits
/// for the same dump gets the same answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum ConntrackError {
    /// This kernel has no connection tracking, or none that speaks netlink.
    #[error(
        "this kernel offers no connection tracking over netlink ({0}); load the module nf_conntrack_netlink, \
         or run a kernel with CONFIG_NF_CONNTRACK, CONFIG_NF_CT_NETLINK and CONFIG_NF_CONNTRACK_EVENTS"
    )]
    Unsupported(Errno),
    /// The kernel has it, and this process may not look.
    #[error(
        "connection tracking may not be read ({0}); run as root, or grant CAP_NET_ADMIN in the user \
         namespace that owns this network namespace (a container needs --cap-add NET_ADMIN)"
    )]
    Permission(Errno),
    /// A system call, or the kernel's answer to a request.
    #[error("{doing} failed: {errno}; it is tried again with the next dump")]
    Kernel { doing: &'static str, errno: Errno },
    /// The table was rebuilt under the dump (`NLM_F_DUMP_INTR`), which may have skipped flows.
    #[error("the dump of {0} flows was interrupted by a change of the table; dump again")]
    Interrupted(Family),
    /// A dump did not go on.
    #[error("the kernel sent no more of the dump of {family} flows for {seconds} s; dump again")]
    Stalled { family: Family, seconds: u64 },
    /// A message that is not what linux/netfilter/nfnetlink_conntrack.h says.
    #[error(
        "a message of the kernel cannot be read: {0}; please report it with the kernel's version"
    )]
    Malformed(#[from] Malformed),
    /// The task that keeps the truth has ended.
    #[error("the connection tracker has been stopped; start another one")]
    Stopped,
}

impl ConntrackError {
    /// Whether trying again is pointless without a change of the host.
    pub fn is_permanent(&self) -> bool {
        matches!(self, Self::Unsupported(_) | Self::Permission(_))
    }

    /// The meaning of an error number from the socket calls and from answers to requests.
    pub(super) fn from_errno(doing: &'static str, errno: Errno) -> Self {
        match errno {
            Errno::PERM | Errno::ACCESS => Self::Permission(errno),
            // No AF_NETLINK, no nfnetlink. EINVAL answers a request to a subsystem of nfnetlink that
            // is not there (nfnetlink_rcv_msg).
            Errno::AFNOSUPPORT | Errno::PROTONOSUPPORT | Errno::OPNOTSUPP | Errno::INVAL => {
                Self::Unsupported(errno)
            }
            errno => Self::Kernel { doing, errno },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn unsupported_and_forbidden_are_told_apart_and_say_how_to_mend() {
        for errno in [Errno::PROTONOSUPPORT, Errno::AFNOSUPPORT, Errno::INVAL] {
            let error = ConntrackError::from_errno("asking", errno);
            assert_eq!(error, ConntrackError::Unsupported(errno));
            assert!(error.to_string().contains("nf_conntrack_netlink"));
            assert!(error.is_permanent());
        }
        let error = ConntrackError::from_errno("asking", Errno::PERM);
        assert_eq!(error, ConntrackError::Permission(Errno::PERM));
        assert!(error.to_string().contains("CAP_NET_ADMIN"));
        let error = ConntrackError::from_errno("asking", Errno::NOMEM);
        assert!(matches!(error, ConntrackError::Kernel { .. }));
        assert!(!error.is_permanent());
    }
}
