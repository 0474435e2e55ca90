//! Finding instances and images: ids, names, prefixes, filters.
use anyhow::{Context as _, Result, ensure};
use doze_e2e::{Case, World, procs};
use serde_json::{Value, json};

pub fn cases() -> Vec<Case> {
    doze_e2e::cases![
        lookup_by_id_name_prefix,
        list_filters,
        image_names,
        image_in_use,
        instances_share_a_rootfs,
        documents
    ]
}

async fn lookup_by_id_name_prefix(world: &World) -> Result<()> {
    let api = world.api().await?;
    let id = world.pet().await?;
    let instance = api.instance(id).await?;
    let name = instance["name"].as_str().context("name")?;
    for key in [id, name, &id[..23]] {
        ensure!(
            api.instance(key).await?["id"] == id,
            "{key} finds another instance"
        );
    }
    api.get("/instances/zzzz")
        .await?
        .refused(404, "not_found", &["zzzz"])?;
    // Of 37 ids two begin with the same letter or digit; far fewer will do nearly always, and the names
    // decide: an instance named like the prefix wins over the prefix.
    let mut ids = vec![id.to_owned()];
    let pair = loop {
        ensure!(ids.len() < 40, "40 ids without a common first character");
        if let Some(pair) = common_prefix(&ids) {
            break pair;
        }
        let created = api.create(world.tiny("prefix")).await?;
        let new = created["id"].as_str().context("id")?.to_owned();
        api.post_empty(&format!("/instances/{new}/stop"))
            .await?
            .expect(200)?;
        ids.push(new);
    };
    let (one, two, prefix) = pair;
    let reply = api.get(&format!("/instances/{prefix}")).await?;
    reply.refused(409, "conflict", &[&one, &two])?;
    api.delete(&format!("/instances/{prefix}"))
        .await?
        .refused(409, "conflict", &[&one])?;
    let mut named = world.tiny("x");
    named["name"] = json!(prefix);
    let exact = api.create(named).await?;
    ensure!(
        api.instance(&prefix).await?["id"] == exact["id"],
        "the exact name does not win over the prefix"
    );
    api.remove(exact["id"].as_str().context("id")?).await?;
    for id in &ids[1..] {
        api.remove(id).await?;
    }
    Ok(())
}

fn common_prefix(ids: &[String]) -> Option<(String, String, String)> {
    ids.iter().enumerate().find_map(|(i, one)| {
        let two = ids[i + 1..].iter().find(|two| two[..1] == one[..1])?;
        Some((one.clone(), two.clone(), one[..1].to_owned()))
    })
}

async fn list_filters(world: &World) -> Result<()> {
    let api = world.api().await?;
    let mut request = world.tiny("tagged");
    request["tags"] = json!({"team": "b & c", "env": "x"});
    let one = world.boot(request).await?;
    let mut request = world.tiny("tagged");
    request["tags"] = json!({"team": "b & c", "env": "y"});
    let two = world.boot(request).await?;
    api.post_empty(&format!("/instances/{two}/stop"))
        .await?
        .expect(200)?;
    let ids = |query: &str| {
        let query = query.to_owned();
        async move {
            let list = api.get(&format!("/instances{query}")).await?.expect(200)?;
            let ids: Option<Vec<String>> = list
                .as_array()
                .context("no array")?
                .iter()
                .map(|i| i["id"].as_str().map(str::to_owned))
                .collect();
            ids.context("an item without id")
        }
    };
    let both = vec![one.clone(), two.clone()];
    ensure!(
        ids("?tags%5Bteam%5D=b%20%26%20c").await? == both,
        "in order of creation"
    );
    ensure!(ids("?tags[team]=b+%26+c&tags[env]=x").await? == both[..1]);
    ensure!(ids("?tags[team]=b%20%26%20c&state=Stopped").await? == both[1..]);
    ensure!(ids("?tags[env]=z").await?.is_empty());
    ensure!(
        ids("?state=Running").await?.contains(&one) && !ids("?state=Running").await?.contains(&two)
    );
    api.get("/instances?state=running").await?.refused(
        400,
        "invalid_field",
        &["state", "running", "Running"],
    )?;
    for id in both {
        api.remove(&id).await?;
    }
    Ok(())
}

/// Any equivalent form finds the image; answers carry the normalised name.
async fn image_names(world: &World) -> Result<()> {
    let api = world.api().await?;
    let listed = api.get("/images").await?.expect(200)?;
    let names: Vec<&str> = listed
        .as_array()
        .context("no array")?
        .iter()
        .filter_map(|i| i["name"].as_str())
        .collect();
    ensure!(
        names.contains(&"docker.io/library/tiny:latest"),
        "{names:?}"
    );
    let image = api.get("/images/tiny").await?.expect(200)?;
    let digest = image["digest"].as_str().context("digest")?.to_owned();
    ensure!(
        digest.starts_with("sha256:") && digest.len() == 71,
        "{digest}"
    );
    ensure!(
        image["status"] == "ready"
            && image["platform"] == "linux/amd64"
            && image["error"] == Value::Null,
        "{image}"
    );
    ensure!(
        image["size_bytes"].as_u64().is_some_and(|s| s > 100_000),
        "{image}"
    );
    ensure!(
        image["env"]["FROM_IMAGE"] == "yes" && image["cmd"][0] == "/bin/sh",
        "{image}"
    );
    for form in [
        "tiny:latest".to_owned(),
        "docker.io%2Flibrary%2Ftiny%3Alatest".to_owned(),
        "library%2Ftiny".to_owned(),
        "index.docker.io%2Flibrary%2Ftiny".to_owned(),
        format!("tiny@{digest}"),
        format!(
            "docker.io%2Flibrary%2Ftiny%3Alatest%40{}",
            digest.replace(':', "%3A")
        ),
    ] {
        let found = api
            .get(&format!("/images/{form}"))
            .await?
            .expect(200)
            .with_context(|| form.clone())?;
        ensure!(
            found["digest"] == digest,
            "{form} finds {}",
            found["digest"]
        );
    }
    let mut request = world.tiny("by-digest");
    request["image"] = json!(format!("tiny@{digest}"));
    let id = api.create(request).await?["id"]
        .as_str()
        .context("id")?
        .to_owned();
    ensure!(
        api.instance(&id).await?["image"]
            .as_str()
            .is_some_and(|i| i.starts_with("docker.io/library/tiny") && i.ends_with(&digest))
    );
    api.remove(&id).await?;
    api.get("/images/absent")
        .await?
        .refused(404, "not_found", &["absent"])?;
    api.delete("/images/absent")
        .await?
        .refused(404, "not_found", &["absent"])?;
    api.get("/images/UPPER")
        .await?
        .refused(400, "invalid_name", &["UPPER"])
}

async fn image_in_use(world: &World) -> Result<()> {
    let api = world.api().await?;
    let id = world.pet().await?;
    api.delete("/images/tiny")
        .await?
        .refused(409, "in_use", &["tiny"])?;
    // Refused means unchanged.
    api.get("/images/tiny").await?.expect(200)?;
    ensure!(api.instance(id).await?["state"] == "Running");
    let spare = world.server.dir.join("layout-tiny-numeric");
    world.server.import("spare:1", &spare).await?;
    let reply = api.delete("/images/spare%3A1").await?;
    ensure!(reply.status == 204, "{} {}", reply.status, reply.text);
    api.get("/images/spare:1")
        .await?
        .refused(404, "not_found", &["spare"])?;
    // Its content has another name and shares its layers: both must still boot.
    api.get("/images/tiny-numeric").await?.expect(200)?;
    let again = world.boot_tiny("after-delete").await?;
    api.remove(&again).await
}

/// One file, opened by two VMMs.
async fn instances_share_a_rootfs(world: &World) -> Result<()> {
    use std::os::unix::fs::MetadataExt as _;
    let api = world.api().await?;
    let one = world.pet().await?.to_owned();
    let two = world.boot_tiny("sibling").await?;
    let mut inodes = Vec::new();
    for vmm in procs::vmms(&world.server.data_dir)? {
        if vmm.instance != one && vmm.instance != two {
            continue;
        }
        for entry in std::fs::read_dir(format!("/proc/{}/fd", vmm.pid))? {
            let entry = entry?.path();
            let (Ok(target), Ok(data)) = (std::fs::read_link(&entry), std::fs::metadata(&entry))
            else {
                continue;
            };
            let inside = target.starts_with(&world.server.data_dir);
            if inside
                && data.is_file()
                && !target.starts_with(world.server.data_dir.join("instances"))
            {
                inodes.push((
                    vmm.instance.clone(),
                    data.ino(),
                    target,
                    data.mode() & 0o222,
                ));
            }
        }
    }
    let shared = inodes.iter().find(|(i, ino, ..)| {
        *i == one
            && inodes
                .iter()
                .any(|(j, other, ..)| *j == two && ino == other)
    });
    let (_, _, path, writable) =
        shared.with_context(|| format!("no file is open in both VMMs: {inodes:?}"))?;
    ensure!(*writable == 0, "{} is writable", path.display());
    api.remove(&two).await
}

/// What the server says about itself.
async fn documents(world: &World) -> Result<()> {
    let api = world.api().await?;
    let open = api.with_token(None);
    ensure!(open.get("/health").await?.expect(200)? == json!({"status": "ok"}));
    for path in ["/instances", "/images", "/capabilities"] {
        open.get(path).await?.refused(401, "unauthorized", &[])?;
        api.with_token(Some("x.y.z".into()))
            .get(path)
            .await?
            .refused(401, "unauthorized", &[])?;
    }
    let spec = api.get("/spec.json").await?.expect(200)?;
    ensure!(
        spec["openapi"]
            .as_str()
            .is_some_and(|v| v.starts_with("3.1")),
        "openapi {}",
        spec["openapi"]
    );
    ensure!(api.get("/spec.yaml").await?.text.contains("openapi: 3.1"));
    let capabilities = api.get("/capabilities").await?.expect(200)?;
    ensure!(
        capabilities["network"]["model"] == "bridge"
            && capabilities["network"]["guest_to_guest"] == false,
        "{capabilities}"
    );
    ensure!(
        capabilities["network"]["gateway"] == world.server.gateway(),
        "{capabilities}"
    );
    ensure!(
        capabilities["default_runtime"] == json!({"name": world.hypervisor, "available": true}),
        "{capabilities}"
    );
    let runtimes = capabilities["runtimes"].as_array().context("runtimes")?;
    let names: Vec<&str> = runtimes.iter().filter_map(|r| r["name"].as_str()).collect();
    ensure!(
        names.contains(&"qemu") && names.contains(&"qemu-microvm") && names.is_sorted(),
        "{names:?}"
    );
    ensure!(
        capabilities["images"]["default_platform"] == "linux/amd64"
            && capabilities["host"]["os"] == "linux",
        "{capabilities}"
    );
    let features = capabilities["features"].as_array().context("features")?;
    for built in ["instances", "images", "exec", "logs"] {
        ensure!(
            features.iter().any(|f| f == built),
            "{built} is not claimed: {features:?}"
        );
    }
    for unbuilt in ["builds", "volumes", "ingress", "devices"] {
        ensure!(
            !features.iter().any(|f| f == unbuilt),
            "{unbuilt} is claimed"
        );
    }
    Ok(())
}
