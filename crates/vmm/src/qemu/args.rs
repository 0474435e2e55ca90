//! From a machine description to QEMU's command line, a pure function.
//!
//! What every machine gets, on either board:
//!
//! ```text
//!   board --- virtio-serial --- doze.agent.0 -> agent.sock     control channel, we connect
//!     |            '----------- doze.app.0   -> app log        append-only
//!     |------ virtio-rng        seeds the guest
//!     |------ virtio-balloon    free-page reporting: pages the guest freed become holes in the memory file
//!     |------ virtio-blk        one for each disk, found by serial
//!     |------ virtio-net        on an existing TAP
//!     |------ pvpanic           tells a kernel panic from a shutdown
//!     |------ vmgenid           q35 only: makes the guest's kernel reseed when the machine is another one
//!     '------ ttyS0 -> stdout -> VMM log
//! ```
//!
//! Durability of disks: the host's page cache is used (`cache.direct=off`: a root file system shared by
//! many machines is cached once), and a guest's flush becomes fdatasync on the host's file
//! (`cache.no-flush=off`). So what a guest flushed survives a power cut of the host, and what it did not
//! flush survives the end of its VMM. `aio=threads`, because io_uring is missing on many kernels and switched off on
//! more. An error of the host's file becomes an I/O error in the guest (`werror=report`); the default
//! would stop the CPUs on a full disk, a state nobody would leave.
//!
//! A disk that is written is locked by QEMU itself (`locking=on`, open file description locks): a second
//! machine on the same overlay fails to start, whatever the records say.
//!
//! The generation (vmgenid) is not part of the saved state: the process that loads it has its own, writes it into
//! the guest's memory and raises the ACPI event before the CPUs run. The microvm would take the device too, but its
//! ACPI tables do not mention it (read in QEMU 7.2's hw/i386/acpi-microvm.c, not tried), so no guest should find it.
//!
//! The order of devices is part of the machine: device state of a saved machine fits only the
//! same list. Append, never insert.
use std::{
    ffi::{OsStr, OsString},
    os::unix::ffi::{OsStrExt, OsStringExt},
    path::{Path, PathBuf},
};

use sha2::{Digest, Sha256};

use super::{APP_LOG_PORT, CONTROL_PORT};
use crate::{Accel, Hypervisor, MachineDescription, MemoryBacking, VmmError};

/// microvm has this many virtio-mmio transports (hw/i386/microvm.h, `VIRTIO_NUM_TRANSPORTS`).
const MICROVM_TRANSPORTS: usize = 8;

/// `sun_path` of unix(7) less its terminating NUL.
const MAX_SOCKET_PATH: usize = 107;

/// Bytes of a virtio-blk serial (virtio 1.2, 5.2.6, `VIRTIO_BLK_ID_BYTES`).
const MAX_SERIAL: usize = 20;

/// Room for translated code under TCG. By default QEMU takes an eighth of the host's memory, 1 GiB at most, for
/// every machine.
const TCG_CODE_MIB: u32 = 256;

/// The monitor's socket of a run.
pub(super) fn qmp_socket(machine: &MachineDescription) -> PathBuf {
    machine.run_dir.join("qmp.sock")
}

/// The control channel's socket of a run.
pub(super) fn agent_socket(machine: &MachineDescription) -> PathBuf {
    machine.run_dir.join("agent.sock")
}

/// Checks what QEMU would not, or would say unclearly.
pub(super) fn check(kind: Hypervisor, machine: &MachineDescription) -> Result<(), VmmError> {
    let refuse = |why: String| Err(VmmError::Unsupported(why));
    if machine.hypervisor != kind {
        return refuse(format!(
            "hypervisor is {:?}, this monitor is {kind:?}",
            machine.hypervisor
        ));
    }
    let board_prefix = match kind {
        Hypervisor::QemuMicrovm => "microvm",
        Hypervisor::Qemu => "pc-q35-",
        Hypervisor::CloudHypervisor | Hypervisor::Firecracker => {
            return refuse(format!("{kind:?} is not a QEMU board"));
        }
    };
    if !machine.machine_type.starts_with(board_prefix)
        || !machine.machine_type.bytes().all(is_plain)
    {
        return refuse(format!(
            "machine_type {:?} does not belong to {kind:?}; its types begin with {board_prefix:?}",
            machine.machine_type
        ));
    }
    if machine.id.is_empty() || !machine.id.bytes().all(is_plain) {
        return refuse(format!(
            "id {:?}; allowed are letters, digits, '-', '_' and '.'",
            machine.id
        ));
    }
    if machine.vcpus == 0 {
        return refuse("vcpus 0; at least 1".to_owned());
    }
    if machine.memory_bytes == 0 || !machine.memory_bytes.is_multiple_of(1 << 20) {
        return refuse(format!(
            "memory_bytes {}; allowed are multiples of 1 MiB (1048576)",
            machine.memory_bytes
        ));
    }
    if let Some(generation) = &machine.generation
        && !is_uuid(generation)
    {
        return refuse(format!(
            "generation {generation:?}; expected a UUID in lower case"
        ));
    }
    check_paths(machine)?;
    check_devices(kind, machine)
}

fn is_uuid(text: &str) -> bool {
    text.len() == 36
        && text.bytes().enumerate().all(|(i, byte)| match i {
            8 | 13 | 18 | 23 => byte == b'-',
            _ => matches!(byte, b'0'..=b'9' | b'a'..=b'f'),
        })
}

fn check_paths(machine: &MachineDescription) -> Result<(), VmmError> {
    let paths = [
        ("memory", &machine.memory.path),
        ("kernel", &machine.kernel),
        ("initramfs", &machine.initramfs),
        ("run_dir", &machine.run_dir),
        ("vmm_log", &machine.vmm_log),
        ("app_log", &machine.app_log),
    ];
    let disks = machine.disks.iter().map(|disk| ("disk", &disk.path));
    for (field, path) in paths.into_iter().chain(disks) {
        // The VMM runs in `/`.
        if !path.is_absolute() {
            return Err(VmmError::Unsupported(format!(
                "{field} {} is not an absolute path",
                path.display()
            )));
        }
    }
    let longest = agent_socket(machine).as_os_str().len();
    if longest > MAX_SOCKET_PATH {
        return Err(VmmError::Unsupported(format!(
            "run_dir {} makes a socket path of {longest} bytes, at most {MAX_SOCKET_PATH} are possible; use a shorter data_dir",
            machine.run_dir.display()
        )));
    }
    Ok(())
}

fn check_devices(kind: Hypervisor, machine: &MachineDescription) -> Result<(), VmmError> {
    let refuse = |why: String| Err(VmmError::Unsupported(why));
    for (i, disk) in machine.disks.iter().enumerate() {
        let serial = &disk.serial;
        if serial.is_empty() || serial.len() > MAX_SERIAL || !serial.bytes().all(is_plain) {
            return refuse(format!(
                "disk serial {serial:?}; allowed are 1 to {MAX_SERIAL} letters, digits and '-'"
            ));
        }
        if machine.disks[..i]
            .iter()
            .any(|other| other.serial == *serial)
        {
            return refuse(format!("disk serial {serial:?} is given twice"));
        }
    }
    if let Some(nic) = &machine.nic {
        // IFNAMSIZ with its NUL is 16 (netdevice(7)).
        if nic.tap.is_empty() || nic.tap.len() > 15 || !nic.tap.bytes().all(is_plain) {
            return refuse(format!(
                "tap {:?}; allowed are 1 to 15 letters, digits, '-', '_' and '.'",
                nic.tap
            ));
        }
        if !is_mac(&nic.mac) {
            return refuse(format!(
                "mac {:?}; expected six pairs of lower-case hexadecimal digits, for example 52:54:00:00:00:01",
                nic.mac
            ));
        }
    }
    // virtio-serial, rng and balloon are always there.
    let transports = 3 + machine.disks.len() + usize::from(machine.nic.is_some());
    if kind == Hypervisor::QemuMicrovm && transports > MICROVM_TRANSPORTS {
        return refuse(format!(
            "{} disks and {} network devices need {transports} virtio-mmio devices with the three that are always there; \
             microvm has {MICROVM_TRANSPORTS}. Use fewer disks or the hypervisor qemu",
            machine.disks.len(),
            usize::from(machine.nic.is_some())
        ));
    }
    Ok(())
}

/// Safe in any option of QEMU, which gives a meaning to `,` and `=` alone.
fn is_plain(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_' | b'.')
}

fn is_mac(mac: &str) -> bool {
    mac.len() == 17
        && mac.bytes().enumerate().all(|(i, byte)| match i % 3 {
            2 => byte == b':',
            _ => matches!(byte, b'0'..=b'9' | b'a'..=b'f'),
        })
}

/// Where guest memory and device state come from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Origin {
    Boot,
    /// A saved machine: QEMU builds the same one and waits for `migrate-incoming`.
    Saved,
}

/// The arguments for a description that passed [`check`].
pub(super) fn build(
    machine: &MachineDescription,
    run_as: Option<&str>,
    origin: Origin,
) -> Vec<OsString> {
    let mut args = Args::default();
    args.process(machine, run_as);
    args.board(machine);
    args.boot(machine);
    args.consoles(machine);
    args.devices(machine);
    if origin == Origin::Saved {
        args.plain("-incoming", "defer");
    }
    args.0
}

#[derive(Default)]
struct Args(Vec<OsString>);

impl Args {
    fn flag(&mut self, name: &str) {
        self.0.push(name.into());
    }

    fn plain(&mut self, name: &str, value: impl AsRef<OsStr>) {
        self.flag(name);
        self.0.push(value.as_ref().to_owned());
    }

    /// `-name head,key=value,...`, with what a value holds kept from being read as more options.
    fn keyed(&mut self, name: &str, head: &str, values: &[(&str, &dyn AsRef<OsStr>)]) {
        let mut option = OsString::from(head);
        for (key, value) in values {
            option.push(format!(",{key}="));
            option.push(doubled_commas(value.as_ref()));
        }
        self.plain(name, option);
    }

    /// A unix socket that we connect to.
    fn listen(&mut self, id: &str, path: &Path) {
        self.keyed(
            "-chardev",
            &format!("socket,id={id}"),
            &[("path", &path), ("server", &"on"), ("wait", &"off")],
        );
    }

    fn process(&mut self, machine: &MachineDescription, run_as: Option<&str>) {
        self.flag("-nodefaults");
        self.flag("-no-user-config");
        self.plain("-display", "none");
        // CPUs wait for `cont`.
        self.flag("-S");
        // A reboot ends the run like a power-off, a panic ends it as a failure, and the process stays until
        // it is killed, so that nobody has to guess from an exit code what the guest did.
        self.plain("-action", "reboot=shutdown,shutdown=pause,panic=pause");
        // The filter is in force before QEMU changes its user, which `elevateprivileges=deny` (also
        // `children`) would answer with a signal. Afterwards no capability is left and
        // no_new_privs is set, so that there is nothing to elevate.
        let elevate = if run_as.is_some() { "allow" } else { "deny" };
        self.plain(
            "-sandbox",
            format!("on,obsolete=deny,elevateprivileges={elevate},spawn=deny,resourcecontrol=deny"),
        );
        if let Some(user) = run_as {
            self.plain("-runas", user);
        }
        self.plain("-name", format!("guest={},debug-threads=on", machine.id));
        self.plain("-uuid", uuid(&machine.id));
        self.listen("qmp", &qmp_socket(machine));
        self.plain("-mon", "chardev=qmp,mode=control");
    }

    fn board(&mut self, machine: &MachineDescription) {
        // Everything off that a guest without legacy devices does not ask for. The microvm keeps the RTC:
        // without it Linux waits two seconds for one.
        let options = match machine.hypervisor {
            Hypervisor::QemuMicrovm => {
                "acpi=on,pit=off,pic=off,rtc=on,isa-serial=on,auto-kernel-cmdline=off,pcie=off,usb=off"
            }
            _ => "smm=off,vmport=off,usb=off,sata=off,smbus=off",
        };
        self.plain(
            "-machine",
            format!("{},{options},memory-backend=ram", machine.machine_type),
        );
        if machine.hypervisor == Hypervisor::Qemu {
            // A guest that suspends itself would look paused to us, and only its own timer could wake it.
            self.plain("-global", "ICH9-LPC.disable_s3=1");
            self.plain("-global", "ICH9-LPC.disable_s4=1");
        }
        match machine.accel {
            Accel::Kvm => {
                self.plain("-accel", "kvm");
                self.plain("-cpu", "host");
            }
            Accel::Tcg => {
                self.plain("-accel", format!("tcg,thread=multi,tb-size={TCG_CODE_MIB}"));
                // All that TCG can do: image programs built for x86-64-v2 and -v3 run. Depends on
                // QEMU's version only, which is kept with a saved machine.
                self.plain("-cpu", "max");
            }
        }
        self.plain("-smp", machine.vcpus.to_string());
        self.plain("-m", format!("size={}M", machine.memory_bytes >> 20));
        let share = match machine.memory.backing {
            MemoryBacking::Shared => "on",
        };
        self.keyed(
            "-object",
            "memory-backend-file,id=ram",
            &[
                ("mem-path", &machine.memory.path),
                ("size", &format!("{}M", machine.memory_bytes >> 20)),
                ("share", &share),
                ("prealloc", &"off"),
            ],
        );
    }

    fn boot(&mut self, machine: &MachineDescription) {
        self.plain("-kernel", &machine.kernel);
        self.plain("-initrd", &machine.initramfs);
        self.plain("-append", &machine.cmdline);
    }

    fn consoles(&mut self, machine: &MachineDescription) {
        // stdout is the VMM log, opened for appending by whoever starts the process.
        self.plain("-chardev", "stdio,id=console,signal=off");
        self.plain("-serial", "chardev:console");
        self.listen("agent", &agent_socket(machine));
        self.keyed(
            "-chardev",
            "file,id=app",
            &[("path", &machine.app_log), ("append", &"on")],
        );
        self.device(machine, "virtio-serial", "id=ports,max_ports=3");
        self.plain(
            "-device",
            format!("virtserialport,bus=ports.0,nr=1,chardev=agent,name={CONTROL_PORT}"),
        );
        self.plain(
            "-device",
            format!("virtserialport,bus=ports.0,nr=2,chardev=app,name={APP_LOG_PORT}"),
        );
    }

    fn devices(&mut self, machine: &MachineDescription) {
        self.plain("-object", "rng-random,id=entropy,filename=/dev/urandom");
        self.device(machine, "virtio-rng", "rng=entropy");
        self.device(
            machine,
            "virtio-balloon",
            "id=balloon,free-page-reporting=on",
        );
        // On the ISA bus, which the microvm has, too: no transport is spent on it.
        self.plain("-device", "pvpanic");
        for (i, disk) in machine.disks.iter().enumerate() {
            let read_only = if disk.read_only { "on" } else { "off" };
            self.keyed(
                "-blockdev",
                &format!("driver=file,node-name=disk{i}"),
                &[
                    ("filename", &disk.path),
                    ("read-only", &read_only),
                    ("auto-read-only", &"off"),
                    ("locking", &"on"),
                    ("discard", &"unmap"),
                    ("aio", &"threads"),
                    ("cache.direct", &"off"),
                    ("cache.no-flush", &"off"),
                ],
            );
            let options = format!(
                "drive=disk{i},serial={},werror=report,rerror=report",
                disk.serial
            );
            self.device(machine, "virtio-blk", &options);
        }
        if let Some(nic) = &machine.nic {
            self.plain(
                "-netdev",
                format!(
                    "tap,id=net0,ifname={},script=no,downscript=no,vhost=off",
                    nic.tap
                ),
            );
            // The option ROM is for booting from the network.
            let rom = match machine.hypervisor {
                Hypervisor::QemuMicrovm => "",
                _ => ",romfile=",
            };
            self.device(
                machine,
                "virtio-net",
                &format!("netdev=net0,mac={}{rom}", nic.mac),
            );
        }
        if let (Some(generation), Hypervisor::Qemu) = (&machine.generation, machine.hypervisor) {
            self.plain("-device", format!("vmgenid,guid={generation}"));
        }
    }

    fn device(&mut self, machine: &MachineDescription, model: &str, options: &str) {
        let transport = match machine.hypervisor {
            Hypervisor::QemuMicrovm => "device",
            _ => "pci",
        };
        self.plain("-device", format!("{model}-{transport},{options}"));
    }
}

/// QEMU reads `,,` in an option's value as one comma.
fn doubled_commas(value: &OsStr) -> OsString {
    let mut escaped = Vec::with_capacity(value.len());
    for byte in value.as_bytes() {
        escaped.push(*byte);
        if *byte == b',' {
            escaped.push(b',');
        }
    }
    OsString::from_vec(escaped)
}

/// A stable UUID for an id: SHA-256 cut to 128 bits, version 8 (RFC 9562, 5.8).
fn uuid(id: &str) -> String {
    let digest = Sha256::digest(id.as_bytes());
    let mut bytes = [0_u8; 16];
    bytes.copy_from_slice(&digest[..16]);
    bytes[6] = (bytes[6] & 0x0f) | 0x80;
    bytes[8] = (bytes[8] & 0x3f) | 0x80;
    let hex = hex::encode(bytes);
    format!(
        "{}-{}-{}-{}-{}",
        &hex[..8],
        &hex[8..12],
        &hex[12..16],
        &hex[16..20],
        &hex[20..]
    )
}

/// Sockets that a run makes.
pub(super) fn sockets(machine: &MachineDescription) -> [PathBuf; 2] {
    [qmp_socket(machine), agent_socket(machine)]
}

#[cfg(test)]
mod tests;
