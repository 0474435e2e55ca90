"""The published Python client, unmodified, against a running doze server.

Environment: DOZE_URL, DOZE_TOKEN; the images `tiny` and `spare-python:1` exist. Prints one line per
case and ends with how many passed; exits with 1 at the first that does not.
"""

from __future__ import annotations

import base64
import datetime
import hashlib
import importlib.metadata
import os
import pathlib
import sys
import threading
import time
import uuid

import httpx
import hypeman
from hypeman.lib.exec import exec as guest_exec

VERSION = "0.28.0"
URL = os.environ["DOZE_URL"]
TOKEN = os.environ["DOZE_TOKEN"]

requests: list[str] = []


def counted_client(**options: object) -> hypeman.Hypeman:
    """Default options, but every request that goes out is counted."""
    http = hypeman.DefaultHttpxClient(
        trust_env=False,
        event_hooks={"request": [lambda r: requests.append(f"{r.method} {r.url.path}")]},
    )
    return hypeman.Hypeman(api_key=options.pop("api_key", TOKEN), base_url=URL, http_client=http, **options)


client = counted_client()


def integrity() -> None:
    """Version, and that every installed file is the one of the published wheel."""
    dist = importlib.metadata.distribution("hypeman")
    assert dist.version == hypeman.__version__ == VERSION, dist.version
    checked = 0
    for file in dist.files or []:
        if file.hash is None:
            continue
        digest = hashlib.new(file.hash.mode, pathlib.Path(dist.locate_file(file)).read_bytes()).digest()
        assert base64.urlsafe_b64encode(digest).rstrip(b"=").decode() == file.hash.value, f"{file} was modified"
        checked += 1
    assert checked > 100, checked
    recorded = pathlib.Path(sys.prefix, "integrity")
    wheel = recorded.read_text().strip() if recorded.exists() else "(not recorded by set-up)"
    print(f"python: hypeman {dist.version} wheel {wheel}; {checked} installed files match its RECORD")


def refused(error: type[hypeman.APIStatusError], status: int, code: str, call, attempts: int = 1) -> str:
    """The call raises this typed error after exactly so many requests; its message."""
    before, started = len(requests), time.monotonic()
    try:
        call()
    except error as exc:
        assert exc.status_code == status, exc
        assert isinstance(exc.body, dict) and exc.body["code"] == code, exc.body
        sent = requests[before:]
        assert len(sent) == attempts, f"{len(sent)} requests in {time.monotonic() - started:.1f} s: {sent}"
        return exc.body["message"]
    raise AssertionError(f"no {error.__name__}")


class Cases:
    """Run in the order they are written; each may use what the former made."""

    def __init__(self) -> None:
        self.id = ""
        self.name = f"py-{uuid.uuid4().hex[:8]}"
        self.digest = client.images.get("tiny").digest

    def health_and_capabilities(self) -> None:
        assert client.health.check().status == "ok"
        capabilities = client.capabilities.get()
        assert capabilities.default_runtime.available
        assert {"instances", "images", "exec", "logs"} <= set(capabilities.features), capabilities.features
        assert all("standby" in runtime.features for runtime in capabilities.runtimes), capabilities.runtimes
        assert capabilities.network.guest_to_guest is False

    def images_list_and_get(self) -> None:
        names = [image.name for image in client.images.list()]
        assert "docker.io/library/tiny:latest" in names, names
        for form in ["tiny", "tiny:latest", "docker.io/library/tiny:latest", f"tiny@{self.digest}"]:
            image = client.images.get(form)
            assert image.digest == self.digest and image.status == "ready", image
            assert isinstance(image.created_at, datetime.datetime)

    def create_by_short_name(self) -> None:
        instance = client.instances.create(
            name=self.name,
            image="tiny",
            size="256MB",
            overlay_size="64MB",
            env={"SDK": "python"},
            tags={"sdk": "python", "run": self.name},
            network={"enabled": True},
        )
        self.id = instance.id
        assert len(instance.id) == 24 and instance.name == self.name
        assert instance.image == "docker.io/library/tiny:latest", instance.image
        assert instance.state in ("Created", "Initializing", "Running"), instance.state
        assert instance.current_phase == instance.state.lower()
        assert instance.phase_durations_ms is not None and instance.env == {"SDK": "python"}

    def wait_for_running(self) -> None:
        answer = client.instances.wait(self.id, state="Running", api_timeout="90s", timeout=100)
        assert answer.state == "Running" and answer.timed_out is False, answer
        answer = client.instances.wait(self.id, state="Stopped", api_timeout="200ms")
        assert answer.state == "Running" and answer.timed_out is True, answer

    def create_by_tag_and_digest(self) -> None:
        for form in ["tiny:latest", f"docker.io/library/tiny@{self.digest}"]:
            name = f"{self.name}-form"
            instance = client.instances.create(name=name, image=form, size="256MB", overlay_size="64MB")
            assert instance.image.startswith("docker.io/library/tiny"), instance.image
            client.instances.delete(instance.id)

    def get_by_id_name_prefix(self) -> None:
        for key in [self.id, self.name, self.id[:20]]:
            instance = client.instances.get(key)
            assert instance.id == self.id and instance.state == "Running"
        assert instance.network and instance.network.ip and instance.network.mac
        assert isinstance(instance.started_at, datetime.datetime) and instance.exit_code is None
        total = datetime.timedelta(milliseconds=sum(instance.phase_durations_ms.values()))
        age = datetime.datetime.now(datetime.timezone.utc) - instance.created_at
        assert abs(age - total) < datetime.timedelta(seconds=2), (age, total)

    def list_with_filters(self) -> None:
        def ids(**filters) -> list[str]:
            return [i.id for i in client.instances.list(**filters)]

        assert self.id in ids()
        assert ids(tags={"sdk": "python", "run": self.name}) == [self.id]
        assert ids(tags={"run": self.name}, state="Running") == [self.id]
        assert ids(tags={"run": self.name}, state="Stopped") == []
        assert ids(tags={"run": "another"}) == []

    def exec_commands(self) -> None:
        result = guest_exec(client, self.id, ["sh", "-c", "echo $SDK $A; pwd; exit 3"], env={"A": "b"}, cwd="/srv")
        assert result.exit_code == 3 and result.output == b"python b\n/srv\n", result
        result = guest_exec(client, self.name, ["sh", "-c", "read a; read b; echo $b $a"], stdin=b"one\ntwo\n")
        assert result.exit_code == 0 and result.output == b"two one\n", result
        result = guest_exec(client, self.id, ["stty", "size"], tty=True, rows=40, cols=99, wait_for_agent=10)
        assert result.exit_code == 0 and result.output == b"40 99\r\n", result
        result = guest_exec(client, self.id, ["sleep", "100"], timeout=1)
        assert result.exit_code == 124, result
        result = guest_exec(client, self.id, ["head", "-c", "3000000", "/dev/zero"])
        assert result.exit_code == 0 and result.output == bytes(3_000_000), len(result.output)

    def logs(self) -> None:
        with client.instances.logs(self.id, tail=100) as stream:
            lines = list(stream)
        assert "program runs" in lines, lines
        for source in ("vmm", "hypeman"):
            with client.instances.logs(self.id, source=source) as stream:
                assert all(isinstance(line, str) for line in stream)

    def logs_follow(self) -> None:
        with client.instances.logs(self.id, follow=True, tail=0) as stream:
            writer = threading.Timer(0.5, lambda: client.instances.stop(self.id))
            writer.start()
            for line in stream:
                if line == "program ends":
                    break
            else:
                raise AssertionError("the stream ended before the program's last words")
            writer.join()

    def stop_and_start(self) -> None:
        stopped = client.instances.stop(self.id)
        assert stopped.state == "Stopped" and stopped.exit_code == 0, stopped
        assert isinstance(stopped.stopped_at, datetime.datetime)
        started = client.instances.start(self.id)
        assert started.state in ("Initializing", "Running"), started.state
        client.instances.wait(self.id, state="Running", api_timeout="90s", timeout=100)
        assert client.instances.start(self.id).state == "Running"

    def standby_and_restore(self) -> None:
        def durations(instance: hypeman.types.Instance) -> dict[str, int]:
            assert instance.phase_durations_ms is not None
            total = datetime.timedelta(milliseconds=sum(instance.phase_durations_ms.values()))
            age = datetime.datetime.now(datetime.timezone.utc) - instance.created_at
            assert abs(age - total) < datetime.timedelta(seconds=2), (age, total)
            return instance.phase_durations_ms

        guest_exec(client, self.id, ["sh", "-c", "echo kept > /dev/shm/kept"])
        before = client.instances.get(self.id)
        assert before.has_snapshot is False and before.current_phase == "running"
        answers: list[hypeman.types.WaitForStateResponse] = []
        waiter = threading.Thread(
            target=lambda: answers.append(client.instances.wait(self.id, state="Standby", api_timeout="60s", timeout=70))
        )
        waiter.start()
        asleep = client.instances.standby(self.id)
        waiter.join()
        assert answers and answers[0].state == "Standby" and answers[0].timed_out is False, answers
        assert asleep.state == "Standby" and asleep.current_phase == "standby" and asleep.has_snapshot is True
        assert isinstance(asleep.current_phase_since, datetime.datetime) and asleep.started_at == before.started_at
        assert asleep.network == before.network and asleep.exit_code is None
        assert {"running", "paused", "standby"} <= set(durations(asleep)), asleep.phase_durations_ms
        assert [i.id for i in client.instances.list(tags={"run": self.name}, state="Standby")] == [self.id]
        # It will not be Running without a command; the answer does not keep anybody waiting.
        answer = client.instances.wait(self.id, state="Running", api_timeout="60s", timeout=5)
        assert answer.state == "Standby" and answer.timed_out is False, answer

        awake = client.instances.restore(self.id)
        assert awake.state == "Running" and awake.current_phase == "running" and awake.has_snapshot is False
        assert awake.network == before.network and awake.started_at == before.started_at
        assert durations(awake)["standby"] >= durations(asleep)["standby"]
        result = guest_exec(client, self.id, ["cat", "/dev/shm/kept"])
        assert result.exit_code == 0 and result.output == b"kept\n", result

    def standby_no_ops_and_conflicts(self) -> None:
        conflict, instances = hypeman.ConflictError, client.instances

        def unchanged(call) -> None:
            """One request, success, and the same phase entered at the same time."""
            before, sent = instances.get(self.id), len(requests)
            after = call()
            assert len(requests) == sent + 1, requests[sent:]
            assert after.state == before.state and after.current_phase_since == before.current_phase_since, after
            assert set(after.phase_durations_ms) == set(before.phase_durations_ms)

        discard = {"discard_memory": True}
        unchanged(lambda: instances.restore(self.id))
        refused(conflict, 409, "invalid_state", lambda: instances.start(self.id, extra_body=discard))
        compress = {"enabled": True, "algorithm": "zstd"}
        message = refused(
            hypeman.InternalServerError, 501, "not_implemented", lambda: instances.standby(self.id, compression=compress)
        )
        assert "compression" in message, message
        malformed = "soon"
        message = refused(
            hypeman.BadRequestError, 400, "invalid_field", lambda: instances.standby(self.id, compression_delay=malformed)
        )
        assert "compression_delay" in message and malformed in message, message
        assert instances.get(self.id).state == "Running"

        instances.standby(self.id)
        unchanged(lambda: instances.standby(self.id))
        unchanged(lambda: instances.standby(self.id, compression={"enabled": False}))
        for call, advice in [
            (lambda: instances.start(self.id), "restore"),
            (lambda: instances.start(self.id, cmd=["true"]), "restore"),
            (lambda: instances.stop(self.id), "restore"),
        ]:
            message = refused(conflict, 409, "invalid_state", call)
            assert "Standby" in message and advice in message, message
        # The upgrade is refused, by whatever error the client's WebSocket library has for it.
        try:
            guest_exec(client, self.id, ["true"])
        except Exception as exc:
            assert "409" in str(exc), exc
        else:
            raise AssertionError("exec in a sleeping instance")

        started = instances.start(self.id, extra_body=discard)
        assert started.state in ("Initializing", "Running") and started.has_snapshot is False, started
        instances.wait(self.id, state="Running", api_timeout="90s", timeout=100)
        result = guest_exec(client, self.id, ["test", "-e", "/dev/shm/kept"])
        assert result.exit_code == 1, "the memory was to be discarded"
        instances.stop(self.id)
        for call in [lambda: instances.standby(self.id), lambda: instances.restore(self.id)]:
            message = refused(conflict, 409, "invalid_state", call)
            assert "Stopped" in message and "start" in message, message
        instances.start(self.id)
        instances.wait(self.id, state="Running", api_timeout="90s", timeout=100)

    def conflict_is_not_retried(self) -> None:
        def create() -> None:
            client.instances.create(name=self.name, image="tiny")

        message = refused(hypeman.ConflictError, 409, "name_conflict", create)
        assert self.name in message, message
        refused(hypeman.ConflictError, 409, "invalid_state", lambda: client.instances.start(self.id, cmd=["true"]))
        refused(hypeman.ConflictError, 409, "in_use", lambda: client.images.delete("tiny"))

    def bad_request(self) -> None:
        def create(**fields) -> None:
            client.instances.create(**{"name": "x", "image": "tiny", **fields})

        refused(hypeman.BadRequestError, 400, "invalid_name", lambda: create(name="Not A Name"))
        refused(hypeman.BadRequestError, 400, "invalid_size", lambda: create(size="big"))
        refused(hypeman.BadRequestError, 400, "invalid_field", lambda: create(extra_body={"no_such_field": 1}))
        refused(hypeman.BadRequestError, 400, "invalid_platform", lambda: create(platform="linux/mips"))

    def not_found(self) -> None:
        refused(hypeman.NotFoundError, 404, "not_found", lambda: client.instances.get("no-such-instance"))
        refused(hypeman.NotFoundError, 404, "not_found", lambda: client.images.get("no-such-image"))
        missing = {"name": "x", "image": "no/such:image"}
        refused(hypeman.NotFoundError, 404, "not_found", lambda: client.instances.create(**missing))

    def not_implemented_is_not_retried(self) -> None:
        error = hypeman.InternalServerError
        refused(error, 501, "not_implemented", lambda: client.volumes.list())
        refused(error, 501, "not_implemented", lambda: client.instances.fork(self.id, name="x"))
        ttl = {"name": "x", "image": "tiny", "ttl": "1h"}
        refused(error, 501, "not_implemented", lambda: client.instances.create(**ttl))
        assert client.instances.get(self.id).state == "Running"

    def unauthorized(self) -> None:
        stranger = counted_client(api_key="not.a.token")
        refused(hypeman.AuthenticationError, 401, "unauthorized", lambda: stranger.instances.list())
        assert stranger.health.check().status == "ok"

    def image_delete(self) -> None:
        client.images.delete("spare-python:1")
        refused(hypeman.NotFoundError, 404, "not_found", lambda: client.images.get("spare-python:1"))

    def delete(self) -> None:
        client.instances.delete(self.id, extra_query={"graceful_shutdown": "true"})
        refused(hypeman.NotFoundError, 404, "not_found", lambda: client.instances.get(self.id))


def main() -> None:
    integrity()
    cases = Cases()
    names = [name for name, value in vars(Cases).items() if callable(value) and not name.startswith("_")]
    for name in names:
        started = time.monotonic()
        getattr(cases, name)()
        print(f"python: {name} ... ok ({time.monotonic() - started:.1f}s)", flush=True)
    print(f"python: {len(names)} passed, 0 failed, 0 skipped")


if __name__ == "__main__":
    main()
