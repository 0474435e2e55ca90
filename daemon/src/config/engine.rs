//! The configuration as the engine wants it.
use std::net::Ipv4Addr;

use doze_engine::{AutoStandbyConfig, EngineConfig, KillSwitch, Limits, StandbyConfig};
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
                run_as: self.monitor_user(rustix::process::geteuid().is_root()),
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
                max_concurrent_restores: limits.max_concurrent_restores,
            },
            standby: StandbyConfig {
                exec_sessions: self.standby.exec_sessions,
            },
            auto_standby: AutoStandbyConfig {
                max_concurrent: self.auto_standby.max_concurrent,
                reconcile: self.auto_standby.reconcile_interval,
            },
            snapshot: self.snapshot,
            memory: self.memory.backing,
            // Checked when the configuration was read.
            kill: KillSwitch::from_env(self.kill_at.clone()).unwrap_or_default(),
        }
    }

    /// Who machine monitors become after they opened their files; `None`: they stay who the server is.
    /// A server that is root does not let them stay root unless told to.
    fn monitor_user(&self, root: bool) -> Option<String> {
        match self.hypervisor.run_as.as_deref() {
            Some("root") => None,
            Some(user) => Some(user.to_owned()),
            None => root.then(|| "nobody".to_owned()),
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use super::*;

    #[test]
    fn monitors_of_a_root_server_are_not_root_unless_told_so() {
        let with = |run_as: Option<&str>| {
            let mut config = Config::parse(None, Vec::<(String, String)>::new()).unwrap();
            config.hypervisor.run_as = run_as.map(str::to_owned);
            config
        };
        assert_eq!(with(None).monitor_user(true).as_deref(), Some("nobody"));
        assert_eq!(with(None).monitor_user(false), None);
        assert_eq!(
            with(Some("doze")).monitor_user(true).as_deref(),
            Some("doze")
        );
        assert_eq!(with(Some("root")).monitor_user(true), None);
    }
}
