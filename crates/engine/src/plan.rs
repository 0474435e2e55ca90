//! From a checked request to what an instance is to be: defaults filled in, limits kept.
use crate::{CreateRequest, Engine, EngineError, InstanceSpec};

impl Engine {
    /// Whether there may be one more.
    pub(crate) fn check_count(&self) -> Result<(), EngineError> {
        let most = self.shared.ctx.config.limits.max_instances;
        if self.shared.registry.len() >= most {
            return Err(EngineError::Capacity {
                resource: "instances",
                wanted: "1".into(),
                available: "0".into(),
                limit: format!("limits.max_instances, {most}"),
            });
        }
        Ok(())
    }

    /// Checks a request against images and limits and fills in the defaults.
    pub(crate) async fn plan(&self, request: CreateRequest) -> Result<InstanceSpec, EngineError> {
        let ctx = &self.shared.ctx;
        let limits = &ctx.config.limits;
        self.check_count()?;
        let vcpus = request.vcpus.unwrap_or(limits.default_vcpus);
        within(
            "vcpus",
            u64::from(vcpus),
            1,
            u64::from(limits.max_vcpus_per_instance),
            "",
        )?;
        let memory = request.memory_bytes.unwrap_or(limits.default_memory);
        within(
            "size",
            memory,
            MIN_MEMORY,
            limits.max_memory_per_instance,
            " bytes",
        )?;
        let overlay = request.overlay_bytes.unwrap_or(limits.default_overlay);
        within(
            "overlay_size",
            overlay,
            MIN_OVERLAY,
            limits.max_overlay,
            " bytes",
        )?;
        let hypervisor = request.hypervisor.unwrap_or(ctx.config.default_hypervisor);
        ctx.monitor(hypervisor)?;
        let image = ctx.image(&request.image).await?;
        if let Some(platform) = request.platform.filter(|wanted| *wanted != image.platform) {
            return Err(EngineError::InvalidField {
                code: "invalid_platform",
                field: "platform".into(),
                value: platform,
                allowed: format!("{}, which {} is", image.platform, image.name),
            });
        }
        Ok(InstanceSpec {
            image: image.name,
            image_digest: image.digest,
            platform: image.platform,
            hypervisor,
            vcpus,
            // Machines are built in whole MiB.
            memory_bytes: memory.next_multiple_of(1 << 20),
            overlay_bytes: overlay.next_multiple_of(1 << 20),
            env: request.env,
            entrypoint: request.entrypoint,
            cmd: request.cmd,
            tags: request.tags,
            network_enabled: request
                .network_enabled
                .unwrap_or(ctx.config.network.is_some()),
            skip_guest_agent: request.skip_guest_agent,
            auto_standby: request.auto_standby,
            snapshot_policy: request.snapshot_policy,
        })
    }
}

const MIN_MEMORY: u64 = 64 << 20;
const MIN_OVERLAY: u64 = 8 << 20;

fn within(field: &str, value: u64, least: u64, most: u64, unit: &str) -> Result<(), EngineError> {
    if (least..=most).contains(&value) {
        return Ok(());
    }
    Err(EngineError::InvalidField {
        code: if unit.is_empty() {
            "invalid_field"
        } else {
            "invalid_size"
        },
        field: field.into(),
        value: shown(value, unit),
        allowed: format!("{} to {}", shown(least, unit), shown(most, unit)),
    })
}

/// Sizes as people write them in requests.
fn shown(value: u64, unit: &str) -> String {
    const MB: u64 = 1 << 20;
    const GB: u64 = 1 << 30;
    if unit.is_empty() || !value.is_multiple_of(MB) {
        format!("{value}{unit}")
    } else if value.is_multiple_of(GB) {
        format!("{}GB", value / GB)
    } else {
        format!("{}MB", value / MB)
    }
}
