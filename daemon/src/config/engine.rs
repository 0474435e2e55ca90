//! The configuration as the engine wants it.
use std::net::Ipv4Addr;

use doze_engine::{EngineConfig, KillSwitch, Limits};
use doze_host::net::NetworkConfig;
use doze_vmm::{boot::KernelSource, qemu::QemuConfig};

use super::Config;

impl Config {
    /// `init` is the guest's program; `host_dns` what guests get when no name server is configured.
    pub(crate) fn engine(&self, init: &'static [u8], host_dns: Vec<Ipv4Addr>) -> EngineConfig {
        let limits = &self.limits;
        EngineConfig {
            data_dir: self.data_dir.clone(),
            default_hypervisor: self.hypervisor.default,
            qemu: QemuConfig {
                binary: self.hypervisor.qemu_path.clone(),
                accel: self.hypervisor.accel,
                run_as: self.hypervisor.run_as.clone(),
            },
            kernel: KernelSource {
                image: self.kernel.image.clone(),
                modules: self.kernel.modules.clone(),
                init,
            },
            kernel_extra_cmdline: self.kernel.extra_cmdline.clone(),
            network: self.network.enabled.then(|| NetworkConfig {
                bridge: self.network.bridge.clone(),
                subnet: self.network.subnet,
                gateway: self.network.gateway,
                table: self.network.table.clone(),
                guest_to_host: self.network.guest_to_host,
            }),
            dns: self.network.dns.clone().unwrap_or(host_dns),
            limits: Limits {
                max_instances: limits.max_instances,
                max_vcpus_per_instance: limits.max_vcpus_per_instance,
                max_memory_per_instance: limits.max_memory_per_instance,
                max_total_memory: limits.max_total_memory,
                max_overlay: limits.max_overlay,
                default_overlay: limits.default_overlay,
                default_memory: limits.default_memory,
                default_vcpus: limits.default_vcpus,
                stop_grace: limits.stop_grace,
                boot_timeout: limits.boot_timeout,
                max_log_bytes: limits.max_log_bytes,
            },
            // Checked when the configuration was read.
            kill: KillSwitch::from_env(self.kill_at.clone()).unwrap_or_default(),
        }
    }
}
