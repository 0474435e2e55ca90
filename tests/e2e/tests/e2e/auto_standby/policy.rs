//! Holds, and policies that change while the instance does something else.
use super::*;

pub fn cases() -> Vec<Case> {
    doze_e2e::cases![
        a_hold_keeps_it_awake,
        a_policy_is_switched_on_and_off,
        only_a_running_one_with_a_network_can,
        one_at_a_time_and_whoever_is_used_while_waiting_stays_awake,
    ]
}

async fn refused_hold(api: &Api, id: &str) -> Result<()> {
    api.post_empty(&format!("/instances/{id}/auto-standby/hold"))
        .await?
        .refused(409, "invalid_state", &["hold", "Standby", "restore"])
}

async fn a_hold_keeps_it_awake(world: &World) -> Result<()> {
    let api = world.api().await?;
    let mut request = world.tiny("held");
    request["auto_standby"] = on(TIMEOUT * 2);
    let id = world.boot(request).await?;
    reaches(api, &id, ("idle_countdown", "idle_timeout_not_elapsed")).await?;
    let asked = now_ms();
    let first = hold(api, &id).await?;
    let until = moment(&first, "hold_until")?;
    ensure!(
        until >= asked + ms(TIMEOUT * 2) && until <= now_ms() + ms(TIMEOUT * 2),
        "asked at {asked}: {first}"
    );
    // A later one replaces it, also when the timeout is shorter now.
    set(api, &id, &on(TIMEOUT)).await?;
    let asked = now_ms();
    let second = hold(api, &id).await?;
    let until = moment(&second, "hold_until")?;
    ensure!(
        until >= asked + ms(TIMEOUT) && until < moment(&first, "hold_until")?,
        "asked at {asked}: {first}, {second}"
    );
    ensure!(moment(&second, "next_standby_at")? >= until, "{second}");
    let paused = falls_asleep(api, &id).await?;
    ensure!(paused >= until, "paused at {paused}, held until {until}");
    refused_hold(api, &id).await?;
    set(api, &id, &json!({"enabled": false})).await?;
    refused_hold(api, &id).await?;
    restore(api, &id).await?;
    let off = hold(api, &id).await?;
    ensure!(
        pair(&off) == ("disabled", "policy_disabled") && off["hold_until"].is_null(),
        "{off}"
    );
    api.remove(&id).await
}

async fn a_policy_is_switched_on_and_off(world: &World) -> Result<()> {
    let api = world.api().await?;
    let id = world.boot_tiny("switched").await?;
    let never = status(api, &id).await?;
    ensure!(
        pair(&never) == ("disabled", "policy_missing") && never["configured"] == false,
        "{never}"
    );
    set(api, &id, &on(TIMEOUT)).await?;
    reaches(api, &id, ("idle_countdown", "idle_timeout_not_elapsed")).await?;
    let off = set(api, &id, &json!({"enabled": false})).await?;
    ensure!(off["auto_standby"] == json!({"enabled": false}), "{off}");
    stays_awake(api, &id, TIMEOUT * 2).await?;
    let off = status(api, &id).await?;
    ensure!(
        pair(&off) == ("disabled", "policy_disabled") && off["configured"] == true,
        "{off}"
    );
    // On again, it is idle from then on.
    let before = now_ms();
    let body =
        json!({"enabled": true, "idle_timeout": "4s", "ignore_source_cidrs": ["10.1.2.3/8"]});
    let shown = set(api, &id, &body).await?;
    ensure!(
        shown["auto_standby"]["ignore_source_cidrs"] == json!(["10.0.0.0/8"]),
        "{shown}"
    );
    not_before(falls_asleep(api, &id).await?, before, TIMEOUT)?;
    // Asleep it can be changed, and what is changed counts when it is awake.
    set(api, &id, &json!({"enabled": false})).await?;
    restore(api, &id).await?;
    stays_awake(api, &id, TIMEOUT + Duration::from_secs(1)).await?;
    api.post_empty(&format!("/instances/{id}/stop"))
        .await?
        .expect(200)?;
    set(api, &id, &on(TIMEOUT)).await?;
    let stopped = status(api, &id).await?;
    ensure!(
        pair(&stopped) == ("ineligible", "instance_not_running"),
        "{stopped}"
    );
    api.post_empty(&format!("/instances/{id}/start"))
        .await?
        .expect(200)?;
    falls_asleep(api, &id).await?;
    api.remove(&id).await
}

async fn only_a_running_one_with_a_network_can(world: &World) -> Result<()> {
    let api = world.api().await?;
    let mut request = world.tiny("offline");
    request["auto_standby"] = on(Duration::from_millis(100));
    request["network"] = json!({"enabled": false});
    let id = world.boot(request).await?;
    let offline = status(api, &id).await?;
    ensure!(
        pair(&offline) == ("ineligible", "network_disabled"),
        "{offline}"
    );
    stays_awake(api, &id, Duration::from_secs(2)).await?;
    let held = hold(api, &id).await?;
    ensure!(pair(&held) == ("ineligible", "network_disabled"), "{held}");
    api.remove(&id).await
}

/// One whose standby hangs has the only turn; another one waits, is used, and is left alone.
async fn one_at_a_time_and_whoever_is_used_while_waiting_stays_awake(world: &World) -> Result<()> {
    let api = world.api().await?;
    world.server.stop().await?;
    let one = [("DOZE_AUTO_STANDBY__MAX_CONCURRENT", "1")];
    world.server.start_with(&one).await?;
    let outcome = waits_and_is_used(world, api).await;
    world.server.stop().await?;
    world.server.start().await?;
    outcome
}

async fn waits_and_is_used(world: &World, api: &Api) -> Result<()> {
    let (waiting, address) = redis(world, "waiting").await?;
    let slow = world.boot_tiny("slow").await?;
    let vmm = crate::crash_standby::only_vmm(world, &slow)?;
    let held = doze_e2e::procs::Held::new(vmm)?;
    set(api, &slow, &on(Duration::from_millis(500))).await?;
    let requested = ("standby_requested", "ready_for_standby");
    reaches(api, &slow, requested).await?;
    set(api, &waiting, &on(TIMEOUT)).await?;
    let ready = ("ready_for_standby", "ready_for_standby");
    reaches(api, &waiting, ready).await?;
    let mut client = Redis::connect(address, PATIENCE).await?;
    reaches(api, &waiting, ("active", "active_inbound_connections")).await?;
    held.release()?;
    falls_asleep(api, &slow).await?;
    stays_awake(api, &waiting, TIMEOUT).await?;
    ensure!(client.command(&["PING"]).await? == "PONG");
    let closed = now_ms();
    drop(client);
    not_before(falls_asleep(api, &waiting).await?, closed, TIMEOUT)?;
    // Its turn can be taken back by a hold, too.
    let held = doze_e2e::procs::Held::new(crate::crash_standby::only_vmm(world, &{
        restore(api, &slow).await?;
        slow.clone()
    })?)?;
    reaches(api, &slow, requested).await?;
    restore(api, &waiting).await?;
    reaches(api, &waiting, ready).await?;
    let asked = now_ms();
    let answer = hold(api, &waiting).await?;
    ensure!(
        pair(&answer) == ("idle_countdown", "idle_timeout_not_elapsed"),
        "{answer}"
    );
    held.release()?;
    not_before(falls_asleep(api, &waiting).await?, asked, TIMEOUT)?;
    api.remove(&slow).await?;
    api.remove(&waiting).await
}
