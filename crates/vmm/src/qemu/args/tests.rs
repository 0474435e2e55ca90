#![allow(clippy::unwrap_used, clippy::expect_used, reason = "tests")]
use super::*;
use crate::{Disk, MemoryImage, Nic};

fn description(hypervisor: Hypervisor, accel: Accel) -> MachineDescription {
    let disk = |serial: &str, read_only| Disk {
        serial: serial.to_owned(),
        path: format!("/d/{serial}").into(),
        read_only,
    };
    MachineDescription {
        hypervisor,
        machine_type: match hypervisor {
            Hypervisor::Qemu => "pc-q35-7.2",
            _ => "microvm",
        }
        .to_owned(),
        accel,
        id: "abc123".to_owned(),
        vcpus: 2,
        memory_bytes: 256 << 20,
        memory: MemoryImage {
            path: "/d/memory".into(),
            backing: MemoryBacking::Shared,
        },
        kernel: "/b/vmlinux".into(),
        initramfs: "/b/initramfs".into(),
        cmdline: "console=ttyS0 quiet".to_owned(),
        disks: vec![disk("doze-rootfs", true), disk("doze-overlay", false)],
        nic: Some(Nic {
            tap: "doze0".to_owned(),
            mac: "52:54:00:00:00:01".to_owned(),
        }),
        run_dir: "/r".into(),
        vmm_log: "/d/vmm.log".into(),
        app_log: "/d/app.log".into(),
        generation: None,
    }
}

/// One option a line.
fn shown(machine: &MachineDescription, run_as: Option<&str>) -> String {
    let mut text = String::new();
    for arg in build(machine, run_as, Origin::Boot) {
        let arg = arg.into_string().unwrap();
        text.push_str(if arg.starts_with('-') { "\n" } else { " " });
        text.push_str(&arg);
    }
    text
}

#[test]
fn q35_under_tcg() {
    assert_eq!(
        shown(&description(Hypervisor::Qemu, Accel::Tcg), None),
        "
-nodefaults
-no-user-config
-display none
-S
-action reboot=shutdown,shutdown=pause,panic=pause
-sandbox on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny
-name guest=abc123,debug-threads=on
-uuid 6ca13d52-ca70-8883-a0f0-bb101e425a89
-chardev socket,id=qmp,path=/r/qmp.sock,server=on,wait=off
-mon chardev=qmp,mode=control
-machine pc-q35-7.2,smm=off,vmport=off,usb=off,sata=off,smbus=off,memory-backend=ram
-global ICH9-LPC.disable_s3=1
-global ICH9-LPC.disable_s4=1
-accel tcg,thread=multi,tb-size=256
-cpu max
-smp 2
-m size=256M
-object memory-backend-file,id=ram,mem-path=/d/memory,size=256M,share=on,prealloc=off
-kernel /b/vmlinux
-initrd /b/initramfs
-append console=ttyS0 quiet
-chardev stdio,id=console,signal=off
-serial chardev:console
-chardev socket,id=agent,path=/r/agent.sock,server=on,wait=off
-chardev file,id=app,path=/d/app.log,append=on
-device virtio-serial-pci,id=ports,max_ports=3
-device virtserialport,bus=ports.0,nr=1,chardev=agent,name=doze.agent.0
-device virtserialport,bus=ports.0,nr=2,chardev=app,name=doze.app.0
-object rng-random,id=entropy,filename=/dev/urandom
-device virtio-rng-pci,rng=entropy
-device virtio-balloon-pci,id=balloon,free-page-reporting=on
-device pvpanic
-blockdev driver=file,node-name=disk0,filename=/d/doze-rootfs,read-only=on,auto-read-only=off,locking=on,discard=unmap,aio=threads,cache.direct=off,cache.no-flush=off
-device virtio-blk-pci,drive=disk0,serial=doze-rootfs,werror=report,rerror=report
-blockdev driver=file,node-name=disk1,filename=/d/doze-overlay,read-only=off,auto-read-only=off,locking=on,discard=unmap,aio=threads,cache.direct=off,cache.no-flush=off
-device virtio-blk-pci,drive=disk1,serial=doze-overlay,werror=report,rerror=report
-netdev tap,id=net0,ifname=doze0,script=no,downscript=no,vhost=off
-device virtio-net-pci,netdev=net0,mac=52:54:00:00:00:01,romfile="
    );
}

/// One that was saved without a generation keeps its list of devices, another one's grows at the end.
#[test]
fn a_generation_is_appended_where_the_guest_can_find_it() {
    for (board, device) in [
        (
            Hypervisor::Qemu,
            "\n-device vmgenid,guid=6ca13d52-ca70-8883-a0f0-bb101e425a89",
        ),
        (Hypervisor::QemuMicrovm, ""),
    ] {
        let mut machine = description(board, Accel::Tcg);
        let before = shown(&machine, None);
        let old = serde_json::to_string(&machine).unwrap();
        assert!(!old.contains("generation"), "{old}");
        assert_eq!(
            serde_json::from_str::<MachineDescription>(&old).unwrap(),
            machine
        );
        machine.renew_generation().unwrap();
        assert_eq!(machine.generation, None);
        machine.generation = Some("6ca13d52-ca70-8883-a0f0-bb101e425a89".into());
        check(board, &machine).unwrap();
        assert_eq!(shown(&machine, None), format!("{before}{device}"));
        let first = machine.generation.clone();
        machine.renew_generation().unwrap();
        assert_ne!(machine.generation, first);
        check(board, &machine).unwrap();
        for bad in ["auto", "", "6CA13D52-ca70-8883-a0f0-bb101e425a89"] {
            machine.generation = Some(bad.into());
            let refused = check(board, &machine).unwrap_err().to_string();
            assert!(refused.contains("generation"), "{refused}");
        }
    }
}

#[test]
fn microvm_under_tcg() {
    assert_eq!(
        shown(&description(Hypervisor::QemuMicrovm, Accel::Tcg), None),
        "
-nodefaults
-no-user-config
-display none
-S
-action reboot=shutdown,shutdown=pause,panic=pause
-sandbox on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny
-name guest=abc123,debug-threads=on
-uuid 6ca13d52-ca70-8883-a0f0-bb101e425a89
-chardev socket,id=qmp,path=/r/qmp.sock,server=on,wait=off
-mon chardev=qmp,mode=control
-machine microvm,acpi=on,pit=off,pic=off,rtc=on,isa-serial=on,auto-kernel-cmdline=off,pcie=off,usb=off,memory-backend=ram
-accel tcg,thread=multi,tb-size=256
-cpu max
-smp 2
-m size=256M
-object memory-backend-file,id=ram,mem-path=/d/memory,size=256M,share=on,prealloc=off
-kernel /b/vmlinux
-initrd /b/initramfs
-append console=ttyS0 quiet
-chardev stdio,id=console,signal=off
-serial chardev:console
-chardev socket,id=agent,path=/r/agent.sock,server=on,wait=off
-chardev file,id=app,path=/d/app.log,append=on
-device virtio-serial-device,id=ports,max_ports=3
-device virtserialport,bus=ports.0,nr=1,chardev=agent,name=doze.agent.0
-device virtserialport,bus=ports.0,nr=2,chardev=app,name=doze.app.0
-object rng-random,id=entropy,filename=/dev/urandom
-device virtio-rng-device,rng=entropy
-device virtio-balloon-device,id=balloon,free-page-reporting=on
-device pvpanic
-blockdev driver=file,node-name=disk0,filename=/d/doze-rootfs,read-only=on,auto-read-only=off,locking=on,discard=unmap,aio=threads,cache.direct=off,cache.no-flush=off
-device virtio-blk-device,drive=disk0,serial=doze-rootfs,werror=report,rerror=report
-blockdev driver=file,node-name=disk1,filename=/d/doze-overlay,read-only=off,auto-read-only=off,locking=on,discard=unmap,aio=threads,cache.direct=off,cache.no-flush=off
-device virtio-blk-device,drive=disk1,serial=doze-overlay,werror=report,rerror=report
-netdev tap,id=net0,ifname=doze0,script=no,downscript=no,vhost=off
-device virtio-net-device,netdev=net0,mac=52:54:00:00:00:01"
    );
}

#[test]
fn acceleration_user_and_odd_paths() {
    let mut machine = description(Hypervisor::QemuMicrovm, Accel::Kvm);
    machine.disks[0].path = "/d/a,readonly=off".into();
    machine.run_dir = "/r,x".into();
    let text = shown(&machine, Some("doze"));
    for option in [
        "\n-accel kvm\n-cpu host\n",
        "\n-runas doze\n",
        "elevateprivileges=allow,",
        "filename=/d/a,,readonly=off,read-only=on",
        "path=/r,,x/qmp.sock,",
    ] {
        assert!(text.contains(option), "{option:?} is not in {text}");
    }
    assert!(!text.contains("tcg"));
}

/// Device state fits only the machine it was saved from.
#[test]
fn a_saved_machine_is_built_like_the_one_that_booted_and_waits() {
    for hypervisor in [Hypervisor::Qemu, Hypervisor::QemuMicrovm] {
        let machine = description(hypervisor, Accel::Tcg);
        let mut booted = build(&machine, Some("doze"), Origin::Boot);
        booted.extend(["-incoming".into(), "defer".into()]);
        assert_eq!(build(&machine, Some("doze"), Origin::Saved), booted);
    }
}

#[test]
fn what_cannot_be_built_is_refused_by_field_and_value() {
    type Change = fn(&mut MachineDescription);
    let cases: &[(&str, Change)] = &[
        ("hypervisor is Qemu", |m| m.hypervisor = Hypervisor::Qemu),
        ("machine_type \"pc-q35-7.2\"", |m| {
            m.machine_type = "pc-q35-7.2".into()
        }),
        ("machine_type \"microvm,x=y\"", |m| {
            m.machine_type = "microvm,x=y".into()
        }),
        ("id \"a,b\"", |m| m.id = "a,b".into()),
        ("id \"\"", |m| m.id.clear()),
        ("vcpus 0", |m| m.vcpus = 0),
        ("memory_bytes 1048577", |m| m.memory_bytes = (1 << 20) + 1),
        ("memory_bytes 0", |m| m.memory_bytes = 0),
        ("app_log x is not an absolute path", |m| {
            m.app_log = "x".into()
        }),
        ("disk d is not an absolute path", |m| {
            m.disks[1].path = "d".into()
        }),
        ("socket path of 112 bytes", |m| {
            m.run_dir = format!("/{}", "x".repeat(100)).into()
        }),
        ("serial \"\"", |m| m.disks[0].serial.clear()),
        ("serial \"abcdefghijklmnopqrstu\"", |m| {
            m.disks[0].serial = "abcdefghijklmnopqrstu".into()
        }),
        ("given twice", |m| {
            m.disks[1].serial = m.disks[0].serial.clone()
        }),
        ("tap \"doze0,script=/x\"", |m| {
            m.nic.as_mut().unwrap().tap = "doze0,script=/x".into()
        }),
        ("mac \"52:54:00:00:00:0G\"", |m| {
            m.nic.as_mut().unwrap().mac = "52:54:00:00:00:0G".into()
        }),
        ("need 9 virtio-mmio", |m| {
            for i in 0..3 {
                let mut disk = m.disks[0].clone();
                disk.serial = format!("more-{i}");
                m.disks.push(disk);
            }
        }),
    ];
    for (words, change) in cases {
        let mut machine = description(Hypervisor::QemuMicrovm, Accel::Tcg);
        check(Hypervisor::QemuMicrovm, &machine).unwrap();
        change(&mut machine);
        let e = check(Hypervisor::QemuMicrovm, &machine)
            .unwrap_err()
            .to_string();
        assert!(e.contains(words), "{e:?} does not say {words:?}");
    }
    // Eight devices fit, and q35 takes more.
    let mut machine = description(Hypervisor::QemuMicrovm, Accel::Tcg);
    let mut disk = machine.disks[0].clone();
    for i in 0..2 {
        disk.serial = format!("more-{i}");
        machine.disks.push(disk.clone());
    }
    check(Hypervisor::QemuMicrovm, &machine).unwrap();
    let mut machine = description(Hypervisor::Qemu, Accel::Tcg);
    for i in 0..9 {
        disk.serial = format!("more-{i}");
        machine.disks.push(disk.clone());
    }
    check(Hypervisor::Qemu, &machine).unwrap();
    let e = check(
        Hypervisor::Firecracker,
        &description(Hypervisor::Firecracker, Accel::Tcg),
    );
    assert!(e.unwrap_err().to_string().contains("not a QEMU board"));
}
