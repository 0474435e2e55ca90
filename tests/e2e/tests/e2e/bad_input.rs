//! Every error by status, code and message, and nothing left behind by any of them.
use std::{fs, path::Path};

use anyhow::{Context as _, Result, bail, ensure};
use doze_e2e::{
    Api, Case, World,
    image::{self, Entry, ImageSpec},
};
use http::Method;
use serde_json::{Value, json};

pub fn cases() -> Vec<Case> {
    doze_e2e::cases![
        unknown_fields,
        malformed_bodies,
        bad_names,
        bad_sizes,
        bad_durations,
        bad_platforms,
        bad_values,
        missing_image,
        name_taken,
        no_capacity,
        invalid_state,
        fields_not_built_yet,
        no_effect_values_are_accepted,
        endpoints_not_built_yet,
        unknown_paths,
        broken_digest,
        escaping_archives,
        unreadable_images,
    ]
}

/// Runs `body`, then looks whether files, TAPs, processes or instances appeared.
async fn leaving_nothing(world: &World, body: impl AsyncFnOnce(&Api) -> Result<()>) -> Result<()> {
    let api = world.api().await?;
    // The first boot makes what later ones share (kernel and initramfs), which is not left behind.
    world.pet().await?;
    let (before, listed) = (world.footprint()?, api.instances().await?.len());
    body(api).await?;
    let left = world.footprint()?.new_since(&before);
    ensure!(left.is_empty(), "left behind: {left:?}");
    ensure!(
        api.instances().await?.len() == listed,
        "an instance was left behind"
    );
    Ok(())
}

/// The request with some fields replaced.
fn with(world: &World, fields: Value) -> Value {
    let mut request = world.tiny("bad");
    if let (Some(request), Some(fields)) = (request.as_object_mut(), fields.as_object()) {
        request.extend(fields.clone());
    }
    request
}

async fn refuse(
    world: &World,
    api: &Api,
    fields: Value,
    status: u16,
    code: &str,
    words: &[&str],
) -> Result<()> {
    let reply = api.post("/instances", with(world, fields.clone())).await?;
    reply
        .refused(status, code, words)
        .with_context(|| format!("create with {fields}"))
}

async fn unknown_fields(world: &World) -> Result<()> {
    leaving_nothing(world, async |api| {
        let words = &["no_such_field"];
        refuse(
            world,
            api,
            json!({"no_such_field": 1}),
            400,
            "invalid_field",
            words,
        )
        .await?;
        refuse(
            world,
            api,
            json!({"network": {"no_such_field": 1}}),
            400,
            "invalid_field",
            words,
        )
        .await?;
        let pet = world.pet().await?;
        api.post(
            &format!("/instances/{pet}/start"),
            json!({"no_such_field": 1}),
        )
        .await?
        .refused(400, "invalid_field", words)?;
        api.post(
            &format!("/instances/{pet}/stop"),
            json!({"no_such_field": 1}),
        )
        .await?
        .refused(400, "invalid_field", words)
    })
    .await
}

async fn malformed_bodies(world: &World) -> Result<()> {
    leaving_nothing(world, async |api| {
        for body in [
            "{",
            "[]",
            "null",
            "",
            "{\"name\": \"a\", \"name\": \"b\", \"image\": \"tiny\"}",
        ] {
            let reply = api
                .send_raw(Method::POST, "/instances", "application/json", body)
                .await?;
            ensure!(
                reply.status == 400,
                "{body:?}: {} {}",
                reply.status,
                reply.text
            );
            ensure!(
                reply.body["code"].is_string() && reply.body["message"].is_string(),
                "{body:?}: {}",
                reply.text
            );
        }
        refuse(
            world,
            api,
            json!({"vcpus": "two"}),
            400,
            "invalid_field",
            &["vcpus"],
        )
        .await?;
        refuse(
            world,
            api,
            json!({"env": {"A": 1}}),
            400,
            "invalid_field",
            &["env"],
        )
        .await?;
        for missing in ["name", "image"] {
            let mut request = world.tiny("bad");
            request
                .as_object_mut()
                .and_then(|r| r.remove(missing))
                .context("field")?;
            api.post("/instances", request)
                .await?
                .refused(400, "missing_field", &[missing])?;
        }
        Ok(())
    })
    .await
}

async fn bad_names(world: &World) -> Result<()> {
    leaving_nothing(world, async |api| {
        let long = "x".repeat(64);
        for name in [
            "", "Upper", "-a", "a-", "a_b", "a.b", "ü", "a b", "../x", &long,
        ] {
            refuse(
                world,
                api,
                json!({"name": name}),
                400,
                "invalid_name",
                &["name", name],
            )
            .await?;
        }
        Ok(())
    })
    .await
}

async fn bad_sizes(world: &World) -> Result<()> {
    leaving_nothing(world, async |api| {
        for size in ["", "lots", "-1GB", "1XB", "1 2", "99999999999GB", "0"] {
            refuse(
                world,
                api,
                json!({"size": size}),
                400,
                "invalid_size",
                &["size", size],
            )
            .await?;
            refuse(
                world,
                api,
                json!({"overlay_size": size}),
                400,
                "invalid_size",
                &["overlay_size", size],
            )
            .await?;
        }
        // Too small to boot anything, and more than one instance may have.
        refuse(
            world,
            api,
            json!({"size": "1MB"}),
            400,
            "invalid_size",
            &["size"],
        )
        .await
    })
    .await
}

async fn bad_durations(world: &World) -> Result<()> {
    leaving_nothing(world, async |api| {
        let pet = world.pet().await?;
        for timeout in ["5", "1x", "-1s", "forever", "1d"] {
            let path = format!("/instances/{pet}/wait?state=Stopped&timeout={timeout}");
            let reply = api.get(&path).await?;
            reply.refused(400, "invalid_field", &["timeout", timeout])?;
        }
        api.get(&format!("/instances/{pet}/wait?state=Asleep"))
            .await?
            .refused(400, "invalid_field", &["state", "Asleep"])?;
        api.get(&format!("/instances/{pet}/wait")).await?.refused(
            400,
            "missing_field",
            &["state"],
        )?;
        let waited = api
            .get(&format!(
                "/instances/{pet}/wait?state=Stopped&timeout=100ms"
            ))
            .await?
            .expect(200)?;
        ensure!(
            waited == json!({"state": "Running", "timed_out": true, "state_error": null})
                || waited["timed_out"] == true,
            "{waited}"
        );
        refuse(
            world,
            api,
            json!({"ttl": "soon"}),
            400,
            "invalid_field",
            &["ttl", "soon"],
        )
        .await
    })
    .await
}

async fn bad_platforms(world: &World) -> Result<()> {
    leaving_nothing(world, async |api| {
        for platform in [
            "linux",
            "windows/amd64",
            "linux/mips",
            "linux/",
            "",
            "linux/amd64/v2/x",
        ] {
            refuse(
                world,
                api,
                json!({"platform": platform}),
                400,
                "invalid_platform",
                &["platform", platform],
            )
            .await?;
        }
        // A proper platform that this image, and this host, does not have.
        let reply = api
            .post(
                "/instances",
                with(world, json!({"platform": "linux/arm64"})),
            )
            .await?;
        reply.refused(400, "invalid_platform", &["linux/arm64"])
    })
    .await
}

async fn bad_values(world: &World) -> Result<()> {
    leaving_nothing(world, async |api| {
        for vcpus in [json!(0), json!(-1), json!(100_000)] {
            refuse(
                world,
                api,
                json!({"vcpus": vcpus}),
                400,
                "invalid_field",
                &["vcpus", &vcpus.to_string()],
            )
            .await?;
        }
        refuse(
            world,
            api,
            json!({"hypervisor": "xen"}),
            400,
            "invalid_field",
            &["hypervisor", "xen", "qemu-microvm"],
        )
        .await?;
        refuse(
            world,
            api,
            json!({"env": {"A=B": "x"}}),
            400,
            "invalid_field",
            &["env", "A=B"],
        )
        .await?;
        refuse(
            world,
            api,
            json!({"image": "Not A Reference"}),
            400,
            "invalid_name",
            &["image", "Not A Reference"],
        )
        .await
    })
    .await
}

async fn missing_image(world: &World) -> Result<()> {
    leaving_nothing(world, async |api| {
        refuse(
            world,
            api,
            json!({"image": "nothing/like:this"}),
            404,
            "not_found",
            &["nothing/like:this"],
        )
        .await?;
        let digest = format!("tiny@sha256:{}", "0".repeat(64));
        refuse(
            world,
            api,
            json!({"image": digest}),
            404,
            "not_found",
            &[&digest],
        )
        .await
    })
    .await
}

async fn name_taken(world: &World) -> Result<()> {
    leaving_nothing(world, async |api| {
        let pet = api.instance(world.pet().await?).await?;
        let name = pet["name"].as_str().context("name")?;
        refuse(
            world,
            api,
            json!({"name": name}),
            409,
            "name_conflict",
            &["name", name],
        )
        .await?;
        // Of many at once exactly one wins.
        let request = world.tiny("race");
        let replies =
            futures::future::join_all((0..4).map(|_| api.post("/instances", request.clone())))
                .await;
        let replies: Vec<_> = replies.into_iter().collect::<Result<_>>()?;
        let made: Vec<&Value> = replies
            .iter()
            .filter(|r| r.status == 201)
            .map(|r| &r.body)
            .collect();
        ensure!(made.len() == 1, "{} of 4 creates won the name", made.len());
        for reply in replies.iter().filter(|r| r.status != 201) {
            reply.refused(409, "name_conflict", &["name"])?;
        }
        api.remove(made[0]["id"].as_str().context("id")?).await
    })
    .await
}

async fn no_capacity(world: &World) -> Result<()> {
    leaving_nothing(world, async |api| {
        // Within what one instance may ask for, but more than any machine has is refused as a value;
        // the configured totals are tested on a server with small ones, in `hosts`.
        let reply = api
            .post("/instances", with(world, json!({"size": "64TB"})))
            .await?;
        ensure!(
            matches!(reply.status, 400 | 409 | 503),
            "{} {}",
            reply.status,
            reply.text
        );
        ensure!(
            matches!(
                reply.body["code"].as_str(),
                Some("invalid_size" | "insufficient_capacity")
            ),
            "{}",
            reply.text
        );
        Ok(())
    })
    .await
}

async fn invalid_state(world: &World) -> Result<()> {
    leaving_nothing(world, async |api| {
        let pet = world.pet().await?;
        let reply = api
            .post(&format!("/instances/{pet}/start"), json!({"cmd": ["true"]}))
            .await?;
        reply.refused(409, "invalid_state", &["Running"])?;
        ensure!(api.instance(pet).await?["state"] == "Running");
        Ok(())
    })
    .await
}

/// Fields of the contract whose effect is not built: refused, each by its name.
async fn fields_not_built_yet(world: &World) -> Result<()> {
    leaving_nothing(world, async |api| {
        for (field, value) in [
            ("ttl", json!({"ttl": "1h"})),
            ("expires_at", json!({"expires_at": "2999-01-01T00:00:00Z"})),
            ("hotplug_size", json!({"hotplug_size": "1GB"})),
            ("disk_io_bps", json!({"disk_io_bps": "100MB/s"})),
            ("devices", json!({"devices": ["gpu0"]})),
            ("gpu", json!({"gpu": {"profile": "L40S-1Q"}})),
            ("volumes", json!({"volumes": [{"volume_id": "v", "mount_path": "/v"}]})),
            ("health_check", json!({"health_check": {"type": "exec", "exec": {"command": ["true"]}}})),
            ("restart_policy", json!({"restart_policy": {"policy": "always"}})),
            ("credentials", json!({"credentials": {"TOKEN": {"source": {"env": "TOKEN"}, "inject": [{"as": {"header": "A", "format": "${value}"}}]}}})),
            ("egress", json!({"network": {"enabled": true, "egress": {"enabled": true}}})),
            ("bandwidth_download", json!({"network": {"bandwidth_download": "1Gbps"}})),
            ("bandwidth_upload", json!({"network": {"bandwidth_upload": "1Gbps"}})),
        ] {
            refuse(world, api, value, 501, "not_implemented", &[field]).await?;
        }
        for hypervisor in ["cloud-hypervisor", "firecracker", "vz"] {
            let reply = api.post("/instances", with(world, json!({"hypervisor": hypervisor}))).await?;
            ensure!(matches!(reply.status, 400 | 501), "{hypervisor}: {} {}", reply.status, reply.text);
            ensure!(reply.text.contains(hypervisor), "{}", reply.text);
        }
        Ok(())
    })
    .await
}

/// The same fields in the value that asks for nothing.
async fn no_effect_values_are_accepted(world: &World) -> Result<()> {
    leaving_nothing(world, async |api| {
        let request = with(
            world,
            json!({
                "ttl": "0s", "devices": [], "volumes": [], "credentials": {}, "skip_kernel_headers": true,
                "skip_guest_agent": false, "network": {"enabled": true, "egress": {"enabled": false}},
                "auto_standby": {"enabled": false}, "tags": {}, "env": {}, "platform": "linux/amd64"
            }),
        );
        let created = api.create(request).await?;
        api.remove(created["id"].as_str().context("id")?).await
    })
    .await
}

/// Paths of the contract that this server does not serve yet: 501, never a fake success.
async fn endpoints_not_built_yet(world: &World) -> Result<()> {
    leaving_nothing(world, async |api| {
        let pet = world.pet().await?;
        let on_instance = |rest: &str| format!("/instances/{pet}{rest}");
        for (method, path) in [
            (Method::POST, "/images".to_owned()),
            (Method::POST, "/images/tiny/tag".to_owned()),
            (Method::GET, "/builds".to_owned()),
            (Method::GET, "/volumes".to_owned()),
            (Method::GET, "/devices".to_owned()),
            (Method::GET, "/devices/available".to_owned()),
            (Method::GET, "/ingresses".to_owned()),
            (Method::GET, "/builders".to_owned()),
            (Method::GET, "/pushes".to_owned()),
            (Method::POST, "/resources/memory/reclaim".to_owned()),
            (Method::GET, on_instance("/stats")),
            (Method::GET, on_instance("/stat?path=/")),
            (Method::GET, on_instance("/cp")),
            (Method::POST, on_instance("/volumes/v")),
        ] {
            let reply = if method == Method::GET {
                api.get(&path).await?
            } else {
                api.send(method.clone(), &path, Some(&json!({}))).await?
            };
            reply.refused(501, "not_implemented", &[])?;
        }
        ensure!(api.instance(pet).await?["state"] == "Running");
        Ok(())
    })
    .await
}

async fn unknown_paths(world: &World) -> Result<()> {
    leaving_nothing(world, async |api| {
        api.get("/no/such/path")
            .await?
            .refused(404, "not_found", &[])?;
        let reply = api
            .send(Method::PUT, "/instances", Some(&json!({})))
            .await?;
        ensure!(
            reply.status == 405 && reply.body["code"].is_string(),
            "{} {}",
            reply.status,
            reply.text
        );
        Ok(())
    })
    .await
}

fn plain_image(name: &'static str) -> ImageSpec {
    ImageSpec {
        name,
        config: json!({"Cmd": ["/bin/true"]}),
    }
}

/// An import that must fail, saying all of `words`; then nothing of the image may be known.
async fn import_fails(
    world: &World,
    api: &Api,
    name: &str,
    path: &Path,
    words: &[&str],
) -> Result<()> {
    match world.server.import(name, path).await {
        Ok(output) => bail!("{name} was imported: {output}"),
        Err(e) => {
            let said = format!("{e:#}");
            for word in words {
                ensure!(
                    said.contains(word),
                    "the message does not say {word:?}: {said}"
                );
            }
        }
    }
    api.get(&format!("/images/{name}"))
        .await?
        .refused(404, "not_found", &[name])
}

async fn broken_digest(world: &World) -> Result<()> {
    leaving_nothing(world, async |api| {
        let entries = [Entry::File {
            path: "f".into(),
            mode: 0o644,
            content: b"content".to_vec(),
        }];
        // Layer and manifest, each changed after it was hashed.
        for (name, manifest) in [("broken-layer", false), ("broken-manifest", true)] {
            let dir = world.server.dir.join(name);
            let digests = image::write_layout(&dir, &entries, &[plain_image("x")])?;
            let index: Value =
                serde_json::from_slice(&fs::read(image::blob_path(&dir, &digests[0]))?)?;
            let layer = index["layers"][0]["digest"].as_str().context("layer")?;
            let victim = image::blob_path(&dir, if manifest { &digests[0] } else { layer });
            let mut bytes = fs::read(&victim)?;
            // The size stays: only the content is another. In JSON a changed space would still parse.
            let at = bytes
                .iter()
                .rposition(|b| *b == b'6' || *b == b't')
                .context("a byte to change")?;
            bytes[at] = b'7';
            fs::write(&victim, bytes)?;
            import_fails(world, api, name, &dir, &["digest"]).await?;
            fs::remove_dir_all(&dir)?;
        }
        Ok(())
    })
    .await
}

async fn escaping_archives(world: &World) -> Result<()> {
    leaving_nothing(world, async |api| {
        let outside = world.server.dir.join("escaped");
        let link = vec![
            Entry::Symlink {
                path: "out".into(),
                target: world.server.dir.to_string_lossy().into_owned(),
            },
            Entry::File {
                path: "out/escaped".into(),
                mode: 0o644,
                content: b"escaped".to_vec(),
            },
        ];
        let absolute = outside.to_string_lossy().into_owned();
        for (name, layer, must_fail) in [
            (
                "escape-dotdot",
                image::hostile_tar("../../../../../../../../tmp/doze-e2e-escaped", None)?,
                true,
            ),
            (
                "escape-inside",
                image::hostile_tar("a/../../b", None)?,
                true,
            ),
            (
                "escape-hardlink",
                image::hostile_tar("h", Some("../../../../etc/hostname"))?,
                true,
            ),
            // Container runtimes take these as relative to the root: fine, as long as nothing is written outside.
            (
                "escape-absolute",
                image::hostile_tar(&absolute, None)?,
                false,
            ),
            ("escape-symlink", image::tar_layer(&link)?, false),
        ] {
            let dir = world.server.dir.join(name);
            image::write_layout_raw(&dir, &layer, &[plain_image("x")])?;
            if must_fail {
                import_fails(world, api, name, &dir, &["layer", "entry"]).await?;
            } else if world.server.import(name, &dir).await.is_ok() {
                api.delete(&format!("/images/{name}")).await?;
            }
            ensure!(
                !outside.exists() && !Path::new("/tmp/doze-e2e-escaped").exists(),
                "{name}: a file was written outside"
            );
            fs::remove_dir_all(&dir)?;
        }
        Ok(())
    })
    .await
}

async fn unreadable_images(world: &World) -> Result<()> {
    leaving_nothing(world, async |api| {
        let dir = world.server.dir.join("unreadable");
        fs::create_dir_all(&dir)?;
        import_fails(
            world,
            api,
            "absent-path",
            &dir.join("nothing"),
            &["nothing"],
        )
        .await?;
        import_fails(world, api, "empty-dir", &dir, &["unreadable"]).await?;
        let file = dir.join("noise.tar");
        fs::write(&file, vec![7; 4096])?;
        import_fails(world, api, "noise", &file, &["noise.tar"]).await?;
        // Cut off in the middle.
        let layout = world.server.dir.join("layout-tiny-numeric");
        let whole = dir.join("whole.tar");
        let tarred = std::process::Command::new("tar")
            .arg("-cf")
            .arg(&whole)
            .arg("-C")
            .arg(&layout)
            .arg(".")
            .status()?;
        ensure!(tarred.success());
        world
            .server
            .import("whole", &whole)
            .await
            .context("a layout in a tar")?;
        let reply = api.delete("/images/whole").await?;
        ensure!(reply.status == 204, "{} {}", reply.status, reply.text);
        let bytes = fs::read(&whole)?;
        fs::write(&whole, &bytes[..bytes.len() / 2])?;
        import_fails(world, api, "cut", &whole, &["whole.tar"]).await?;
        fs::remove_dir_all(&dir)?;
        Ok(())
    })
    .await
}
