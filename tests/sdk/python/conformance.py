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
        self.moment = self.disk = ""

    def health_and_capabilities(self) -> None:
        assert client.health.check().status == "ok"
        capabilities = client.capabilities.get()
        assert capabilities.default_runtime.available
        assert {"instances", "images", "exec", "logs"} <= set(capabilities.features), capabilities.features
        abilities = {"standby", "snapshots", "fork"}
        assert all(abilities <= set(runtime.features) for runtime in capabilities.runtimes), capabilities.runtimes
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

    def compression(self) -> None:
        """Who decides, when it begins, and what readers see of it; with an instance of its own."""
        instances, snapshots = client.instances, client.instances.snapshots
        wanted = {"enabled": True, "algorithm": "lz4", "level": 1}
        made = instances.create(
            name=f"{self.name}-packed",
            image="tiny",
            size="256MB",
            overlay_size="64MB",
            snapshot_policy={"compression": wanted, "standby_compression_delay": "60m"},
        )
        instances.wait(made.id, state="Running", api_timeout="90s", timeout=100)
        for shown in [instances.get(made.id), *(i for i in instances.list() if i.id == made.id)]:
            assert shown.snapshot_policy and shown.snapshot_policy.compression, shown
            assert shown.snapshot_policy.compression.to_dict() == wanted, shown
            assert shown.snapshot_policy.standby_compression_delay == "1h0m0s", shown
        account = ["sh", "-c", "test -e /dev/shm/noise || head -c 8000000 /dev/urandom > /dev/shm/noise; md5sum /dev/shm/noise"]
        before = guest_exec(client, made.id, account).output

        def kept() -> dict | None:
            return (instances.get(made.id).model_extra or {}).get("standby_compression")

        def until(look, done):
            end = time.monotonic() + 300
            while not done(found := look()):
                assert time.monotonic() < end, found
                time.sleep(0.05)
            return found

        zstd = {"enabled": True, "algorithm": "zstd", "level": 3}
        default = {"enabled": True, "algorithm": "zstd", "level": 1}
        for options, config, state in [
            ({}, wanted, "pending"),
            ({"compression": {"enabled": True}}, default, "pending"),
            ({"compression": zstd, "compression_delay": "1h"}, zstd, "pending"),
            ({"compression": zstd, "compression_delay": "0s"}, zstd, "compressed"),
            ({"compression_delay": "0s"}, wanted, "compressed"),
            ({"compression": {"enabled": False, "level": 99}, "compression_delay": "1ms"}, None, None),
        ]:
            assert instances.standby(made.id, **options).state == "Standby", options
            if config is None:
                assert kept() is None, (options, kept())
            else:
                found = until(kept, lambda found: found["state"] == state)
                assert found["compression"] == config and "error" not in found, (options, found)
                assert found["uncompressed_size_bytes"] == 256 << 20, found
                assert 0 < found.get("compressed_size_bytes", 1) < 256 << 20, found
                assert ("compressed_size_bytes" in found) is (state == "compressed"), found
            instances.restore(made.id, timeout=100)
            assert kept() is None, kept()
            assert guest_exec(client, made.id, account).output == before, options

        for options, config in [({}, wanted), ({"compression": zstd}, zstd), ({"compression": {"enabled": False}}, None)]:
            taken = snapshots.create(made.id, kind="Standby", timeout=100, **options)
            assert taken.uncompressed_size_bytes == 256 << 20 and taken.compression_error is None, taken
            if config is None:
                assert taken.compression_state == "none" and taken.compression is None, taken
                assert taken.compressed_size_bytes is None, taken
            else:
                assert taken.compression_state in ("compressing", "compressed"), taken
                # It never waits, whatever the instance's delay.
                done = until(lambda: client.snapshots.get(taken.id), lambda s: s.compression_state == "compressed")
                assert done.compression and done.compression.to_dict() == config, done
                assert done.compressed_size_bytes and 0 < done.compressed_size_bytes < 256 << 20, done
                assert done.compressed_size_bytes < done.size_bytes, done
                assert done.size_bytes < taken.size_bytes or taken.compression_state == "compressed", (done, taken)
            snapshots.restore(taken.id, id=made.id, timeout=100)
            assert guest_exec(client, made.id, account).output == before, options
            client.snapshots.delete(taken.id)

        for wrong, code, word in [
            ({"enabled": True, "level": 20}, "invalid_field", "1 to 19"),
            ({"enabled": True, "algorithm": "lz4", "level": 10}, "invalid_field", "0 to 9"),
            ({"enabled": True, "algorithm": "brotli"}, "invalid_field", "brotli"),
            ({"algorithm": "zstd"}, "missing_field", "enabled"),
        ]:
            create = {"name": "x", "image": "tiny", "snapshot_policy": {"compression": wrong}}
            for call in [
                lambda: instances.standby(made.id, compression=wrong),
                lambda: snapshots.create(made.id, kind="Standby", compression=wrong),
                lambda: instances.create(**create),
            ]:
                message = refused(hypeman.BadRequestError, 400, code, call)
                assert "compression" in message and word in message, message
        for delay in ["soon", "-1s"]:
            create = {"name": "x", "image": "tiny", "snapshot_policy": {"standby_compression_delay": delay}}
            for call in [lambda: instances.standby(made.id, compression_delay=delay), lambda: instances.create(**create)]:
                message = refused(hypeman.BadRequestError, 400, "invalid_field", call)
                assert "compression_delay" in message and delay in message, message
        assert instances.get(made.id).state == "Running"
        instances.delete(made.id)

    def snapshots_of_running(self) -> None:
        """Leaves `self.moment` behind: memory that says `then`."""
        instances, snapshots = client.instances, client.instances.snapshots
        before = instances.get(self.id)
        guest_exec(client, self.id, ["sh", "-c", "echo then > /dev/shm/now"])
        refused(hypeman.ConflictError, 409, "invalid_state", lambda: snapshots.create(self.id, kind="Stopped"))
        moment = snapshots.create(self.id, kind="Standby", name="moment", tags={"run": self.name, "of": "running"})
        self.moment = moment.id
        assert len(moment.id) == 24 and moment.name == "moment" and moment.kind == "Standby", moment
        assert (moment.source_instance_id, moment.source_instance_name) == (self.id, self.name), moment
        assert moment.source_hypervisor == before.hypervisor and isinstance(moment.created_at, datetime.datetime)
        assert moment.tags == {"run": self.name, "of": "running"} and moment.compression_state == "none", moment
        assert moment.uncompressed_size_bytes == 256 << 20, moment
        assert moment.size_bytes > moment.uncompressed_size_bytes and moment.compressed_size_bytes is None, moment
        assert moment.model_extra and moment.model_extra["scheduled"] is False, moment
        assert 0 < moment.model_extra["allocated_bytes"] <= moment.size_bytes, moment
        # The source has gone on.
        after = instances.get(self.id)
        assert after.state == "Running" and after.started_at == before.started_at and after.network == before.network
        message = refused(
            hypeman.ConflictError, 409, "name_conflict", lambda: snapshots.create(self.id, kind="Standby", name="moment")
        )
        assert "moment" in message, message

        def ids(**filters) -> list[str]:
            return [snapshot.id for snapshot in client.snapshots.list(**filters)]

        for key in [moment.id, moment.id[:20]]:
            assert client.snapshots.get(key).id == moment.id
        assert moment.id in ids()
        assert ids(source_instance_id=self.id, kind="Standby", name="moment", tags={"of": "running"}) == [moment.id]
        for other in [{"kind": "Stopped"}, {"name": "another"}, {"tags": {"of": "stopped"}}]:
            assert ids(source_instance_id=self.id, **other) == [], other
        assert ids(source_instance_id=self.moment) == []

    def fork_of_running(self) -> None:
        instances, name = client.instances, f"{self.name}-fork"
        source = instances.get(self.id)
        message = refused(hypeman.ConflictError, 409, "invalid_state", lambda: instances.fork(self.id, name=name))
        assert "from_running" in message, message
        fork = instances.fork(self.id, name=name, from_running=True, timeout=100)
        assert fork.state == "Running" and fork.name == name and fork.id != self.id, fork
        assert fork.network and source.network and fork.network.ip != source.network.ip, (fork, source)
        assert fork.network.mac != source.network.mac
        assert (fork.image, fork.env, fork.tags, fork.size) == (source.image, source.env, source.tags, source.size)
        # Its own time only, not its source's.
        age = datetime.datetime.now(datetime.timezone.utc) - fork.created_at
        total = datetime.timedelta(milliseconds=sum((fork.phase_durations_ms or {}).values()))
        assert abs(age - total) < datetime.timedelta(seconds=2), (age, total)
        assert guest_exec(client, fork.id, ["cat", "/dev/shm/now"]).output == b"then\n"
        identity = ["cat", "/proc/sys/kernel/random/uuid"]
        assert guest_exec(client, fork.id, identity).output != guest_exec(client, self.id, identity).output
        after = instances.get(self.id)
        assert after.state == "Running" and after.started_at == source.started_at and after.network == source.network
        taken = {"name": self.name, "from_running": True}
        refused(hypeman.ConflictError, 409, "name_conflict", lambda: instances.fork(self.id, **taken))
        instances.delete(fork.id)
        assert client.snapshots.get(self.moment).id == self.moment

    def restore_of_snapshots(self) -> None:
        """Back in place, then asleep; a sleeping source's copies are made without a boot."""
        instances, snapshots, name = client.instances, client.instances.snapshots, f"{self.name}-fork"
        before = instances.get(self.id)
        guest_exec(client, self.id, ["sh", "-c", "echo later > /dev/shm/now"])
        again = snapshots.restore(self.moment, id=self.id, timeout=100)
        assert again.id == self.id and again.state == "Running" and again.network == before.network, again
        assert guest_exec(client, self.id, ["cat", "/dev/shm/now"]).output == b"then\n"
        asleep = snapshots.restore(self.moment, id=self.name, target_state="Standby", timeout=100)
        assert asleep.state == "Standby" and asleep.has_snapshot is True, asleep

        second = snapshots.create(self.id, kind="Standby")
        assert second.name is None and second.uncompressed_size_bytes == 256 << 20, second
        client.snapshots.delete(second.id)
        refused(hypeman.NotFoundError, 404, "not_found", lambda: client.snapshots.get(second.id))
        refused(hypeman.NotFoundError, 404, "not_found", lambda: client.snapshots.delete(second.id))
        for make, state in [
            (lambda: instances.fork(self.id, name=name), "Standby"),
            (lambda: instances.fork(self.id, name=name, target_state="Stopped"), "Stopped"),
            (lambda: client.snapshots.fork(self.moment, name=name, target_state="Standby"), "Standby"),
            (lambda: client.snapshots.fork(self.moment, name=name, target_state="Stopped"), "Stopped"),
        ]:
            fork = make()
            assert fork.state == state and fork.name == name and fork.id != self.id, fork
            assert fork.has_snapshot is (state == "Standby"), fork
            # A fork's history is its own: the moment is its source's.
            foreign = {"id": fork.id, "target_state": "Stopped"}
            refused(hypeman.NotFoundError, 404, "not_found", lambda: snapshots.restore(self.moment, **foreign))
            instances.delete(fork.id)
        assert instances.get(self.id).state == "Standby"

    def snapshots_of_stopped(self) -> None:
        """Leaves `self.disk` behind, and the instance running: the moment brings it back without a boot."""
        instances, snapshots, name = client.instances, client.instances.snapshots, f"{self.name}-fork"
        stopped = snapshots.restore(self.moment, id=self.id, target_state="Stopped", timeout=100)
        assert stopped.state == "Stopped" and stopped.has_snapshot is False, stopped
        refused(hypeman.ConflictError, 409, "invalid_state", lambda: snapshots.create(self.id, kind="Standby"))
        disk = snapshots.create(self.id, kind="Stopped", name="disk")
        self.disk = disk.id
        assert disk.kind == "Stopped" and disk.uncompressed_size_bytes is None, disk
        assert disk.size_bytes >= 64 << 20 and disk.compression_state == "none", disk
        for make in [
            lambda: instances.fork(self.id, name=name),
            lambda: client.snapshots.fork(disk.id, name=name),
            lambda: client.snapshots.fork(disk.id, name=name, target_hypervisor="qemu"),
        ]:
            fork = make()
            assert fork.state == "Stopped" and fork.id != self.id, fork
            instances.delete(fork.id)
        assert fork.hypervisor == "qemu", fork
        assert snapshots.restore(disk.id, id=self.id).state == "Stopped"
        for call in [
            lambda: instances.fork(self.id, name=name, target_state="Standby"),
            lambda: client.snapshots.fork(disk.id, name=name, target_state="Standby"),
            lambda: snapshots.restore(disk.id, id=self.id, target_state="Standby"),
        ]:
            message = refused(hypeman.BadRequestError, 400, "invalid_field", call)
            assert "target_state" in message and "Stopped, Running" in message, message
        awake = snapshots.restore(self.moment, id=self.id, timeout=100)
        assert awake.state == "Running" and awake.network == stopped.network, awake
        assert guest_exec(client, self.id, ["cat", "/dev/shm/now"]).output == b"then\n"

    def snapshots_refused(self) -> None:
        instances, snapshots = client.instances, client.instances.snapshots
        bad, missing = hypeman.BadRequestError, hypeman.NotFoundError
        compress = {"enabled": True}
        refused(bad, 400, "invalid_name", lambda: snapshots.create(self.id, kind="Standby", name="Not A Name"))
        refused(bad, 400, "invalid_field", lambda: snapshots.create(self.id, kind="Asleep"))
        refused(bad, 400, "invalid_field", lambda: snapshots.create(self.id, kind="Standby", tags={"": "x"}))
        refused(bad, 400, "invalid_field", lambda: snapshots.create(self.id, kind="Stopped", compression=compress))
        unbuilt = hypeman.InternalServerError
        refused(bad, 400, "invalid_name", lambda: instances.fork(self.id, name="-"))
        refused(bad, 400, "invalid_field", lambda: instances.fork(self.id, name="x", target_state="Paused"))
        refused(bad, 400, "invalid_name", lambda: client.snapshots.fork(self.moment, name="-"))
        for monitor, error, status, code in [
            ("qemu", bad, 400, "invalid_field"),
            ("firecracker", unbuilt, 501, "not_implemented"),
        ]:
            for call in [
                lambda: client.snapshots.fork(self.moment, name="x", target_hypervisor=monitor),
                lambda: snapshots.restore(self.moment, id=self.id, target_hypervisor=monitor),
            ]:
                message = refused(error, status, code, call)
                assert "target_hypervisor" in message and monitor in message, message
        refused(bad, 400, "invalid_field", lambda: client.snapshots.list(kind="Asleep"))
        refused(missing, 404, "not_found", lambda: client.snapshots.get("no-such-snapshot"))
        refused(missing, 404, "not_found", lambda: client.snapshots.fork("no-such-snapshot", name="x"))
        refused(missing, 404, "not_found", lambda: instances.fork("no-such-instance", name="x"))
        refused(missing, 404, "not_found", lambda: snapshots.create("no-such-instance", kind="Standby"))
        refused(missing, 404, "not_found", lambda: snapshots.restore("no-such-snapshot", id=self.id))
        refused(missing, 404, "not_found", lambda: snapshots.restore(self.moment, id="no-such-instance"))
        assert instances.get(self.id).state == "Running"

    def snapshot_schedules(self) -> None:
        schedules, hour = client.instances.snapshot_schedule, datetime.timedelta(hours=1)
        refused(hypeman.NotFoundError, 404, "not_found", lambda: schedules.get(self.id))
        made = schedules.update(
            self.id, interval="90m", retention={"max_count": 3}, metadata={"by": "schedule"}, name_prefix="nightly"
        )
        assert made.instance_id == self.id and made.interval == "1h30m0s" and made.retention.max_count == 3, made
        assert made.metadata == {"by": "schedule"} and made.name_prefix == "nightly", made
        assert made.last_run_at is None and made.last_snapshot_id is None and made.last_error is None, made
        now = datetime.datetime.now(datetime.timezone.utc)
        assert now < made.next_run_at < now + 3 * hour, made
        assert schedules.get(self.name) == made
        # Only another interval begins another cadence.
        kept = schedules.update(self.id, interval="90m", retention={"max_age": "36h"})
        assert kept.next_run_at == made.next_run_at and kept.created_at == made.created_at, (made, kept)
        assert kept.retention.max_age == "36h0m0s" and kept.retention.max_count is None and not kept.metadata, kept
        moved = schedules.update(self.id, interval="24h", retention={"max_count": 1})
        assert moved.next_run_at != made.next_run_at and moved.interval == "24h0m0s", moved
        for code, fields in [
            ("invalid_field", {"interval": "59s"}),
            ("invalid_field", {"interval": "60"}),
            ("invalid_field", {"retention": {}}),
            ("invalid_field", {"retention": {"max_count": 0}}),
            ("invalid_field", {"retention": {"max_age": "old"}}),
            ("invalid_field", {"metadata": {"": "x"}}),
            ("invalid_name", {"name_prefix": "a" * 48}),
        ]:
            good = {"interval": "1h", "retention": {"max_count": 1}}
            call = lambda fields=fields: schedules.update(self.id, **{**good, **fields})  # noqa: E731
            message = refused(hypeman.BadRequestError, 400, code, call)
            assert message.startswith(next(iter(fields))), message
        assert schedules.get(self.id) == moved
        schedules.delete(self.id)
        for call in [
            lambda: schedules.get(self.id),
            lambda: schedules.delete(self.id),
            lambda: schedules.update("no-such-instance", interval="1h", retention={"max_count": 1}),
        ]:
            refused(hypeman.NotFoundError, 404, "not_found", call)

    def resources(self) -> None:
        found = client.resources.get()
        for kind in ("cpu", "memory", "disk", "network"):
            status = getattr(found, kind)
            assert status.type == kind and status.available == max(0, status.effective_limit - status.allocated), status
            assert abs(status.capacity * status.oversub_ratio - status.effective_limit) <= 1 + status.capacity / 1e12, status
        assert found.cpu.capacity >= 1 and found.memory.capacity >= 64 << 20, found
        assert found.memory.allocated >= 256 << 20, found.memory
        assert found.disk.capacity > found.disk.allocated > 0, found.disk
        assert found.network.capacity == 0 and found.gpu is None and found.disk_io is None, found
        parts = found.disk_breakdown
        assert parts and parts.images_bytes and parts.overlays_bytes, parts
        assert parts.model_extra and parts.model_extra["snapshots_bytes"] > 0, parts
        mine = [a for a in found.allocations if a.instance_id == self.id]
        assert len(mine) == 1 and mine[0].instance_name == self.name, mine
        assert mine[0].memory_bytes == 256 << 20 and (mine[0].cpu or 0) >= 1 and (mine[0].disk_bytes or 0) > 0, mine

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
        refused(error, 501, "not_implemented", lambda: client.instances.stat(self.id, path="/"))
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

    def snapshots_outlive_their_source(self) -> None:
        kept = client.snapshots.list(source_instance_id=self.id)
        assert [snapshot.id for snapshot in kept] == [self.moment, self.disk], kept
        assert all(snapshot.source_instance_name == self.name for snapshot in kept), kept
        fork = client.snapshots.fork(self.moment, name=self.name, timeout=100)
        assert fork.state == "Running" and fork.id != self.id, fork
        assert guest_exec(client, fork.id, ["cat", "/dev/shm/now"]).output == b"then\n"
        # Nor does what was made from them need them.
        for snapshot in kept:
            client.snapshots.delete(snapshot.id)
        assert client.snapshots.list(source_instance_id=self.id) == []
        assert client.instances.get(fork.id).state == "Running"
        client.instances.delete(fork.id)


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
