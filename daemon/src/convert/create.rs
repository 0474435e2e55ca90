//! From a create or start request of the wire to the engine's.
use doze_api::{CreateInstanceRequest, StartInstanceRequest};
use doze_engine::{CreateRequest, StartOverrides};
use doze_vmm::Hypervisor;

use super::{
    auto_standby, compression,
    fields::{self, Checked},
    unbuilt,
};
use crate::http::errors::ApiError;

/// Checks every field and reports all that is wrong with them.
pub(crate) fn create(request: CreateInstanceRequest) -> Checked<CreateRequest> {
    let mut complaints = unbuilt::check(&request);
    let mut keep = Collector(&mut complaints);
    keep.checked(fields::instance_name(&request.name));
    keep.checked(image(&request.image));
    keep.checked(request.platform.as_deref().map_or(Ok(()), fields::platform));
    let hypervisor = keep.checked(
        request
            .hypervisor
            .map(|wanted| self::hypervisor("hypervisor", wanted))
            .transpose(),
    );
    let vcpus = keep.checked(request.vcpus.map(vcpus).transpose());
    let memory_bytes = keep.checked(request.size.as_deref().map(fields::memory_size).transpose());
    let overlay_bytes = keep.checked(
        request
            .overlay_size
            .as_deref()
            .map(fields::overlay_size)
            .transpose(),
    );
    keep.checked(command("entrypoint", request.entrypoint.as_deref()));
    keep.checked(command("cmd", request.cmd.as_deref()));
    let env = request.env.unwrap_or_default();
    let tags = request.tags.unwrap_or_default();
    complaints.extend(fields::environment("env", &env));
    complaints.extend(fields::tags(&tags));
    let auto_standby = match request.auto_standby.as_ref().map(auto_standby::policy) {
        None => None,
        Some(Ok(policy)) => Some(policy),
        Some(Err(found)) => {
            complaints.extend(found);
            None
        }
    };
    let snapshot_policy = match request.snapshot_policy.as_ref().map(compression::policy) {
        None => None,
        Some(Ok(policy)) => Some(policy),
        Some(Err(found)) => {
            complaints.extend(found);
            None
        }
    };
    if let Some(error) = ApiError::all(complaints) {
        return Err(error);
    }
    Ok(CreateRequest {
        name: request.name,
        image: request.image,
        platform: request.platform,
        hypervisor: hypervisor.flatten(),
        vcpus: vcpus.flatten(),
        memory_bytes: memory_bytes.flatten(),
        overlay_bytes: overlay_bytes.flatten(),
        env,
        entrypoint: request.entrypoint,
        cmd: request.cmd,
        tags,
        network_enabled: request.network.and_then(|network| network.enabled),
        skip_guest_agent: request.skip_guest_agent.unwrap_or(false),
        auto_standby,
        snapshot_policy,
    })
}

/// Overrides of a start request.
pub(crate) fn start(request: StartInstanceRequest) -> Checked<StartOverrides> {
    command("entrypoint", request.entrypoint.as_deref())?;
    command("cmd", request.cmd.as_deref())?;
    Ok(StartOverrides {
        entrypoint: request.entrypoint,
        cmd: request.cmd,
    })
}

/// Gathers complaints, so that one answer has them all.
pub(super) struct Collector<'a>(pub(super) &'a mut Vec<ApiError>);

impl Collector<'_> {
    pub(super) fn checked<T>(&mut self, outcome: Checked<T>) -> Option<T> {
        outcome.map_err(|error| self.0.push(error)).ok()
    }
}

fn command(field: &str, words: Option<&[String]>) -> Checked<()> {
    words.map_or(Ok(()), |words| fields::words(field, words))
}

fn image(reference: &str) -> Checked<()> {
    reference
        .parse::<doze_image::Reference>()
        .map(drop)
        .map_err(|error| ApiError::invalid("invalid_name", format!("image: {error}")))
}

fn vcpus(count: i64) -> Checked<u32> {
    u32::try_from(count)
        .ok()
        .filter(|count| *count >= 1)
        .ok_or_else(|| fields::invalid("invalid_field", "vcpus", count, "1 and more"))
}

/// A monitor that this build has.
pub(super) fn hypervisor(field: &str, hypervisor: doze_api::Hypervisor) -> Checked<Hypervisor> {
    match hypervisor {
        doze_api::Hypervisor::Qemu => Ok(Hypervisor::Qemu),
        doze_api::Hypervisor::QemuMicrovm => Ok(Hypervisor::QemuMicrovm),
        doze_api::Hypervisor::CloudHypervisor
        | doze_api::Hypervisor::Firecracker
        | doze_api::Hypervisor::Vz => Err(ApiError::not_implemented(format!(
            "{field}: {hypervisor} is not built yet on this server; built are: qemu, qemu-microvm"
        ))),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, reason = "tests")]
    use serde_json::{Value, json};

    use super::*;

    fn convert(body: Value) -> Checked<CreateRequest> {
        create(serde_json::from_value(body).unwrap())
    }

    #[test]
    fn everything_arrives() {
        let request = convert(json!({
            "name": "web", "image": "alpine", "hypervisor": "qemu", "vcpus": 3, "size": "512MB",
            "overlay_size": "2GB", "env": {"A": "b"}, "entrypoint": ["/bin/sh"], "cmd": [],
            "tags": {"t": "v"}, "network": {"enabled": false}, "skip_guest_agent": true,
        }))
        .unwrap();
        assert_eq!(request.name, "web");
        assert_eq!(request.image, "alpine");
        assert_eq!(request.hypervisor, Some(Hypervisor::Qemu));
        assert_eq!(request.vcpus, Some(3));
        assert_eq!(request.memory_bytes, Some(512 << 20));
        assert_eq!(request.overlay_bytes, Some(2 << 30));
        assert_eq!(request.env["A"], "b");
        assert_eq!(request.entrypoint, Some(vec!["/bin/sh".to_owned()]));
        assert_eq!(request.cmd, Some(vec![]));
        assert_eq!(request.tags["t"], "v");
        assert_eq!(request.network_enabled, Some(false));
        assert!(request.skip_guest_agent);
    }

    #[test]
    fn what_is_absent_is_left_to_the_server() {
        let request = convert(json!({"name": "web", "image": "alpine"})).unwrap();
        assert_eq!(request.vcpus, None);
        assert_eq!(request.memory_bytes, None);
        assert_eq!(request.network_enabled, None);
        assert_eq!(request.cmd, None);
    }

    #[test]
    fn each_field_has_its_code() {
        for (body, status, code) in [
            (json!({"name": "A", "image": "b"}), 400, "invalid_name"),
            (json!({"name": "a", "image": "a//b"}), 400, "invalid_name"),
            (
                json!({"name": "a", "image": "b", "size": "1"}),
                400,
                "invalid_size",
            ),
            (
                json!({"name": "a", "image": "b", "overlay_size": "x"}),
                400,
                "invalid_size",
            ),
            (
                json!({"name": "a", "image": "b", "vcpus": 0}),
                400,
                "invalid_field",
            ),
            (
                json!({"name": "a", "image": "b", "vcpus": -1}),
                400,
                "invalid_field",
            ),
            (
                json!({"name": "a", "image": "b", "platform": "x"}),
                400,
                "invalid_platform",
            ),
            (
                json!({"name": "a", "image": "b", "env": {"": "x"}}),
                400,
                "invalid_field",
            ),
            (
                json!({"name": "a", "image": "b", "tags": {"": "x"}}),
                400,
                "invalid_field",
            ),
            (
                json!({"name": "a", "image": "b", "cmd": ["a\0b"]}),
                400,
                "invalid_field",
            ),
            (
                json!({"name": "a", "image": "b", "hypervisor": "vz"}),
                501,
                "not_implemented",
            ),
        ] {
            let error = convert(body.clone()).unwrap_err();
            assert_eq!(
                (error.status.as_u16(), error.body.code.as_str()),
                (status, code),
                "{body}"
            );
        }
    }

    #[test]
    fn all_complaints_come_at_once() {
        let error = convert(json!({
            "name": "A", "image": "b", "size": "x", "vcpus": 0, "ttl": "1h", "gpu": {"profile": "p"},
        }))
        .unwrap_err();
        assert_eq!(error.status.as_u16(), 400);
        assert_eq!(error.body.details.len(), 5, "{:?}", error.body.details);
    }
}
