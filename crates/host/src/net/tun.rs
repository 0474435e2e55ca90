//! The TUN driver's ioctls (linux/if_tun.h, Documentation/networking/tuntap.rst), which netlink
//! has no words for: a TAP is made, and opened, through /dev/net/tun alone.
use std::{
    fs::{File, OpenOptions},
    io,
    os::fd::{AsRawFd, OwnedFd},
};

use super::{NetError, names::LinkName, privilege};

const DEVICE: &str = "/dev/net/tun";

/// What every TAP of ours is opened with; an opener that disagrees on the vnet header changes the TAP.
const FLAGS: libc::c_int = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR;

/// Who owns a TAP that is nobody's in particular.
pub(super) const ROOT: u32 = 0;

/// `struct ifreq` of netdevice(7): the name, then a union of 24 bytes that starts with the flags.
#[repr(C)]
struct InterfaceRequest {
    name: [u8; libc::IFNAMSIZ],
    flags: libc::c_short,
    rest: [u8; 22],
}

/// A TAP that we have open. If it was new, it vanishes with this, unless it is kept.
#[derive(Debug)]
pub(super) struct Unkept(OwnedFd);

/// Makes the TAP, or attaches to it where it exists, and gives it an owner.
pub(super) fn make(name: &LinkName, owner: Option<u32>) -> Result<Unkept, NetError> {
    let tap = attach(name)?;
    // A TAP without an owner is open to everybody who may open /dev/net/tun, by default all users.
    number(&tap, libc::TUNSETOWNER, owner.unwrap_or(ROOT).into())
        .map_err(|e| failed(name, "set the owner of", &e))?;
    Ok(Unkept(tap))
}

impl Unkept {
    /// Makes the TAP persistent, and lets go of it.
    pub(super) fn keep(self, name: &LinkName) -> Result<(), NetError> {
        number(&self.0, libc::TUNSETPERSIST, 1).map_err(|e| failed(name, "keep", &e))
    }
}

/// A descriptor that reads what is sent to the guest behind the TAP, and writes what it sends; each
/// frame with a `virtio_net_hdr` of 10 bytes before it. The TAP is made (not persistent) if it is absent.
pub(super) fn attach(name: &LinkName) -> Result<OwnedFd, NetError> {
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .open(DEVICE)
        .map_err(|e| match e.kind() {
            io::ErrorKind::NotFound => NetError::Missing {
                what: format!("{DEVICE} does not exist"),
                mend: "load the module tun".into(),
            },
            io::ErrorKind::PermissionDenied => privilege(&format!("open {DEVICE}")),
            _ => failed(name, "open /dev/net/tun for", &e),
        })?;
    set_interface(&file, name).map_err(|e| match e.raw_os_error() {
        Some(libc::EPERM | libc::EACCES) => privilege("make TAPs"),
        Some(libc::EBUSY) => NetError::Failed {
            context: format!("opening the TAP {name}"),
            message: "another process has it open; end that process first".into(),
        },
        _ => failed(name, "open", &e),
    })?;
    Ok(file.into())
}

#[allow(unsafe_code, reason = "TUN ioctl")]
fn set_interface(tun: &File, name: &LinkName) -> io::Result<()> {
    let mut request = InterfaceRequest {
        name: [0; libc::IFNAMSIZ],
        // 0x5002 fits.
        flags: FLAGS as libc::c_short,
        rest: [0; 22],
    };
    // A LinkName has at most 15 bytes, so a zero always follows.
    for (to, from) in request.name.iter_mut().zip(name.as_str().bytes()) {
        *to = from;
    }
    // SAFETY: TUNSETIFF reads and writes one `struct ifreq`, which `request` is by layout and size
    // (40 bytes); it lives until the call returns. The descriptor is open.
    let answer = unsafe { libc::ioctl(tun.as_raw_fd(), libc::TUNSETIFF, &raw mut request) };
    check(answer)
}

#[allow(unsafe_code, reason = "TUN ioctl")]
fn number(tun: &OwnedFd, operation: libc::Ioctl, value: libc::c_ulong) -> io::Result<()> {
    // SAFETY: TUNSETOWNER and TUNSETPERSIST take their argument as a number; no memory is touched.
    let answer = unsafe { libc::ioctl(tun.as_raw_fd(), operation, value) };
    check(answer)
}

fn check(answer: libc::c_int) -> io::Result<()> {
    if answer < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(())
    }
}

fn failed(name: &LinkName, step: &str, e: &io::Error) -> NetError {
    NetError::Failed {
        context: format!("cannot {step} the TAP {name}"),
        message: e.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_request_is_as_large_as_the_kernels() {
        assert_eq!(size_of::<InterfaceRequest>(), 40);
        assert_eq!(libc::c_int::from(FLAGS as libc::c_short), FLAGS);
    }
}
