//! The server ends and comes back while an instance is on its way to sleep.
use doze_e2e::procs::Held;

use super::*;
use crate::crash_standby::only_vmm;

pub fn cases() -> Vec<Case> {
    doze_e2e::cases![
        a_countdown_goes_on,
        a_hold_goes_on,
        a_connection_keeps_it_awake_and_a_gone_one_does_not,
        those_that_waited_sleep_after_a_crash,
    ]
}

/// Long enough for a restart in between.
const LONG: Duration = Duration::from_secs(20);
/// Moments are told on the wall clock, reckoned back from the boot clock.
const ROUNDING: i128 = 100;

async fn a_countdown_goes_on(world: &World) -> Result<()> {
    let api = world.api().await?;
    let mut request = world.tiny("counting");
    request["auto_standby"] = on(LONG);
    let id = world.boot(request).await?;
    let countdown = ("idle_countdown", "idle_timeout_not_elapsed");
    let idle_since = moment(&reaches(api, &id, countdown).await?, "idle_since")?;
    // It is written down once it has lasted.
    tokio::time::sleep(Duration::from_secs(2)).await;
    for crash in [false, true] {
        match crash {
            true => world.server.kill().await?,
            false => world.server.stop().await?,
        }
        world.server.start().await?;
        let after = reaches(api, &id, countdown).await?;
        let goes_on = moment(&after, "idle_since")?;
        ensure!(
            (goes_on - idle_since).abs() <= ROUNDING,
            "idle since {idle_since}, after a restart (crash: {crash}) {after}"
        );
    }
    not_before(falls_asleep(api, &id).await?, idle_since, LONG)?;
    api.remove(&id).await
}

async fn a_hold_goes_on(world: &World) -> Result<()> {
    let api = world.api().await?;
    let mut request = world.tiny("held");
    request["auto_standby"] = on(LONG);
    let id = world.boot(request).await?;
    let until = moment(&hold(api, &id).await?, "hold_until")?;
    // At once: what was answered is durable.
    world.server.kill().await?;
    world.server.start().await?;
    let after = status(api, &id).await?;
    ensure!(
        (moment(&after, "hold_until")? - until).abs() <= ROUNDING,
        "held until {until}, after a crash {after}"
    );
    // Shorter now, and the hold stands.
    set(api, &id, &on(Duration::from_secs(1))).await?;
    let paused = falls_asleep(api, &id).await?;
    ensure!(
        paused >= until - ROUNDING,
        "paused at {paused}, held until {until}"
    );
    api.remove(&id).await
}

async fn a_connection_keeps_it_awake_and_a_gone_one_does_not(world: &World) -> Result<()> {
    let (id, address) = redis(world, "through").await?;
    let api = world.api().await?;
    let mut client = Redis::connect(address, PATIENCE).await?;
    client.command(&["SET", "colour", "green"]).await?;
    set(api, &id, &on(TIMEOUT)).await?;
    reaches(api, &id, ("active", "active_inbound_connections")).await?;
    world.server.kill().await?;
    world.server.start().await?;
    let active = reaches(api, &id, ("active", "active_inbound_connections")).await?;
    ensure!(active["active_inbound_connections"] == 1, "{active}");
    stays_awake(api, &id, TIMEOUT * 2).await?;
    ensure!(client.command(&["GET", "colour"]).await? == "green");
    // It goes while nobody looks: the timeout begins when somebody does.
    world.server.kill().await?;
    drop(client);
    let back = now_ms();
    world.server.start().await?;
    not_before(falls_asleep(api, &id).await?, back, TIMEOUT)?;
    api.remove(&id).await
}

/// One hangs in its standby, one waits for its turn, and the server dies. The one that hung is resumed and
/// counts anew, the other one's time is over already.
async fn those_that_waited_sleep_after_a_crash(world: &World) -> Result<()> {
    let api = world.api().await?;
    let one = [("DOZE_AUTO_STANDBY__MAX_CONCURRENT", "1")];
    world.server.stop().await?;
    world.server.start_with(&one).await?;
    let slow = world.boot_tiny("slow").await?;
    let waiting = world.boot_tiny("waiting").await?;
    let held = Held::new(only_vmm(world, &slow)?)?;
    set(api, &slow, &on(Duration::from_millis(500))).await?;
    reaches(api, &slow, ("standby_requested", "ready_for_standby")).await?;
    set(api, &waiting, &on(TIMEOUT)).await?;
    let ready = ("ready_for_standby", "ready_for_standby");
    let idle_since = moment(&reaches(api, &waiting, ready).await?, "idle_since")?;
    world.server.kill().await?;
    held.release()?;
    let back = now_ms();
    world.server.start_with(&one).await?;
    let paused = falls_asleep(api, &waiting).await?;
    not_before(paused, idle_since, TIMEOUT)?;
    ensure!(paused >= back, "asleep although the server was dead");
    falls_asleep(api, &slow).await?;
    world.server.stop().await?;
    world.server.start().await?;
    api.remove(&slow).await?;
    api.remove(&waiting).await
}
