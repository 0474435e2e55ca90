"""Every status of automatic standby and its reason, through the published Python client, unmodified.

Environment: DOZE_URL, DOZE_TOKEN; the image `tiny` exists; the server lets one instance at a time fall asleep. What
the API cannot bring about is asked of whoever runs this: a line `@...` on stdout, answered by a line on stdin.
"""

from __future__ import annotations

import datetime
import os
import socket
import sys
import time
import uuid

import httpx
import hypeman

requests: list[str] = []
client = hypeman.Hypeman(
    api_key=os.environ["DOZE_TOKEN"],
    base_url=os.environ["DOZE_URL"],
    http_client=hypeman.DefaultHttpxClient(
        trust_env=False, event_hooks={"request": [lambda r: requests.append(f"{r.method} {r.url.path}")]}
    ),
)
PORT = 7000
LISTENS = ["/bin/sh", "-c", f"while :; do nc -l -p {PORT}; done"]
seen: set[tuple[str, str]] = set()
run = uuid.uuid4().hex[:8]


def ask(what: str) -> None:
    print(f"@{what}", flush=True)
    assert sys.stdin.readline() == "done\n", what


def status(key: str) -> hypeman.types.AutoStandbyStatus:
    found = client.instances.auto_standby.status(key)
    seen.add((found.status, found.reason))
    return found


def reaches(key: str, word: str, reason: str) -> hypeman.types.AutoStandbyStatus:
    end = time.monotonic() + 90
    while True:
        found = status(key)
        if (found.status, found.reason) == (word, reason):
            return found
        assert time.monotonic() < end, f"not {word}/{reason}: {found}"
        time.sleep(0.02)


def boot(name: str, **fields: object) -> hypeman.types.Instance:
    request = {"image": "tiny", "size": "256MB", "overlay_size": "64MB", "vcpus": 1, **fields}
    made = client.instances.create(name=f"{name}-py-{run}", **request)
    client.instances.wait(made.id, state="Running", api_timeout="90s", timeout=100)
    return client.instances.get(made.id)


def policy(key: str, **fields: object) -> hypeman.types.Instance:
    return client.instances.update(key, auto_standby=fields)


def refused(error: type[hypeman.APIStatusError], status: int, code: str, call) -> str:
    before = len(requests)
    try:
        call()
    except error as exc:
        assert exc.status_code == status and exc.body["code"] == code, exc
        assert len(requests) == before + 1, requests[before:]
        return exc.body["message"]
    raise AssertionError(f"no {error.__name__}")


def policy_and_status(one: hypeman.types.Instance) -> None:
    assert one.auto_standby is None
    never = reaches(one.id, "disabled", "policy_missing")
    assert never.configured is False and never.enabled is False and never.supported is True
    assert policy(one.id, enabled=False, idle_timeout="5m").auto_standby.idle_timeout is None
    assert reaches(one.id, "disabled", "policy_disabled").configured is True
    wrong = {"enabled": True, "idle_timeout": "0s"}
    refused(hypeman.BadRequestError, 400, "invalid_field", lambda: policy(one.id, **wrong))
    refused(hypeman.BadRequestError, 400, "invalid_request", lambda: client.instances.update(one.id, extra_body={}))
    ttl = lambda: client.instances.update(one.id, ttl="1h", auto_standby={"enabled": True, "idle_timeout": "1m"})
    refused(hypeman.InternalServerError, 501, "not_implemented", ttl)
    ports = [9100, 22, 9100]
    on = policy(
        one.id,
        enabled=True,
        idle_timeout="60m",
        ignore_source_cidrs=["192.168.7.9/16", "10.255.0.0/16"],
        ignore_destination_ports=ports,
    ).auto_standby
    assert on.enabled is True and on.idle_timeout == "1h0m0s", on
    assert on.ignore_source_cidrs == ["10.255.0.0/16", "192.168.0.0/16"], on
    assert on.ignore_destination_ports == [22, 9100], on
    assert client.instances.get(one.id).auto_standby == on
    assert [i.auto_standby for i in client.instances.list() if i.id == one.id] == [on]


def countdown_and_activity(one: hypeman.types.Instance) -> None:
    idle = reaches(one.id, "idle_countdown", "idle_timeout_not_elapsed")
    assert idle.eligible and idle.active_inbound_connections == 0 and idle.idle_timeout == "1h0m0s"
    assert isinstance(idle.idle_since, datetime.datetime) and isinstance(idle.next_standby_at, datetime.datetime)
    assert idle.countdown_remaining and idle.hold_until is None
    assert idle.tracking_mode == "conntrack_events_v4_tcp"
    with socket.create_connection((one.network.ip, PORT), timeout=60):
        active = reaches(one.id, "active", "active_inbound_connections")
        assert active.active_inbound_connections == 1 and active.idle_since is None, active
    idle = reaches(one.id, "idle_countdown", "idle_timeout_not_elapsed")
    assert isinstance(idle.last_inbound_activity_at, datetime.datetime)
    held = client.instances.auto_standby.hold(one.id)
    assert isinstance(held.hold_until, datetime.datetime) and held.status == "idle_countdown"
    policy(one.id, enabled=True, idle_timeout="300ms")
    assert status(one.id).hold_until == held.hold_until or abs(status(one.id).hold_until - held.hold_until) < datetime.timedelta(seconds=1)
    assert client.instances.auto_standby.hold(one.id).hold_until < held.hold_until


def main() -> None:
    one, other = boot("one", cmd=LISTENS), boot("other")
    offline = boot("offline", network={"enabled": False}, auto_standby={"enabled": True, "idle_timeout": "1m"})
    assert reaches(offline.id, "ineligible", "network_disabled").eligible is False
    policy_and_status(one)
    ask(f"freeze {other.id}")
    policy(other.id, enabled=True, idle_timeout="200ms")
    reaches(other.id, "standby_requested", "ready_for_standby")
    countdown_and_activity(one)
    reaches(one.id, "ready_for_standby", "ready_for_standby")
    ask("thaw")
    for key in (one.id, other.id):
        assert client.instances.wait(key, state="Standby", api_timeout="90s", timeout=100).state == "Standby"
        assert reaches(key, "ineligible", "instance_not_running").eligible is False
    hold = lambda: client.instances.auto_standby.hold(one.id)
    message = refused(hypeman.ConflictError, 409, "invalid_state", hold)
    assert "restore" in message, message
    policy(one.id, enabled=True, idle_timeout="1h")
    client.instances.restore(one.id)
    reaches(one.id, "idle_countdown", "idle_timeout_not_elapsed")
    ask("deaf")
    reaches(one.id, "error", "observer_error")
    reaches(one.id, "idle_countdown", "idle_timeout_not_elapsed")
    ask("blind")
    blind = reaches(one.id, "unsupported", "unsupported_platform")
    assert blind.supported is False and blind.enabled is True
    assert client.instances.auto_standby.hold(one.id).status == "unsupported"
    ask("see")
    for key in (one.id, other.id, offline.id):
        client.instances.delete(key)
    refused(hypeman.NotFoundError, 404, "not_found", lambda: client.instances.auto_standby.status(one.id))
    print(f"python: {len(seen)} pairs of status and reason", flush=True)


if __name__ == "__main__":
    main()
