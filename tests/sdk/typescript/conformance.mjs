// The published TypeScript client, unmodified, against a running doze server.
//
// Environment: DOZE_URL, DOZE_TOKEN, DOZE_SDK_NODE_DIR (the folder whose node_modules holds the
// client); the images `tiny` and `spare-typescript:1` exist. Prints one line per case and ends with
// how many passed; exits with 1 at the first that does not. The client has no exec.
import assert from 'node:assert/strict';
import { randomBytes } from 'node:crypto';
import { readFileSync } from 'node:fs';
import { createRequire } from 'node:module';
import path from 'node:path';

const VERSION = '0.28.0';
const nodeDir = path.resolve(process.env.DOZE_SDK_NODE_DIR);
const require = createRequire(path.join(nodeDir, 'from-here.js'));
const { default: Hypeman, ...sdk } = require('@onkernel/hypeman');

const requests = [];
function countedClient(options = {}) {
  return new Hypeman({
    apiKey: process.env.DOZE_TOKEN,
    baseURL: process.env.DOZE_URL,
    fetch: (url, init) => {
      requests.push(`${init?.method ?? 'GET'} ${new URL(url).pathname}`);
      return fetch(url, init);
    },
    ...options,
  });
}
const client = countedClient();

function integrity() {
  const manifest = path.join(nodeDir, 'node_modules/@onkernel/hypeman/package.json');
  const { version } = JSON.parse(readFileSync(manifest, 'utf8'));
  assert.equal(version, VERSION);
  const installed = JSON.parse(readFileSync(path.join(nodeDir, 'node_modules/.package-lock.json'), 'utf8'));
  const entry = installed.packages['node_modules/@onkernel/hypeman'];
  assert.equal(entry.version, VERSION);
  assert.match(entry.integrity, /^sha512-/);
  console.log(`typescript: @onkernel/hypeman ${version} ${entry.integrity}`);
}

// The call is rejected with this typed error after exactly one request; its message.
async function refused(Kind, status, code, call) {
  const before = requests.length;
  let failure;
  try {
    await call();
  } catch (error) {
    failure = error;
  }
  assert.ok(failure, `no ${Kind.name}`);
  assert.ok(failure instanceof Kind, `${failure?.constructor?.name}: ${failure}`);
  assert.equal(failure.status, status);
  assert.equal(failure.error?.code, code, JSON.stringify(failure.error));
  assert.deepEqual(requests.slice(before).length, 1, `requests: ${requests.slice(before)}`);
  return failure.error.message;
}

async function collect(stream) {
  const lines = [];
  for await (const line of stream) lines.push(line);
  return lines;
}

const name = `ts-${randomBytes(4).toString('hex')}`;
const forkName = `${name}-fork`;
let id;
let digest;
// Snapshots that several cases use: of the running instance, and of the stopped one.
let moment;
let disk;

// Run in the order they are written; each may use what the former made.
const cases = {
  async health_and_capabilities() {
    assert.equal((await client.health.check()).status, 'ok');
    const capabilities = await client.capabilities.get();
    assert.equal(capabilities.default_runtime.available, true);
    for (const feature of ['instances', 'images', 'exec', 'logs']) assert.ok(capabilities.features.includes(feature));
    for (const runtime of capabilities.runtimes) {
      for (const ability of ['standby', 'snapshots', 'fork']) assert.ok(runtime.features.includes(ability), runtime.name);
    }
    assert.equal(capabilities.network.guest_to_guest, false);
  },
  async images_list_and_get() {
    const names = (await client.images.list()).map((image) => image.name);
    assert.ok(names.includes('docker.io/library/tiny:latest'), String(names));
    digest = (await client.images.get('tiny')).digest;
    for (const form of ['tiny:latest', 'docker.io/library/tiny:latest', `tiny@${digest}`]) {
      const image = await client.images.get(form);
      assert.equal(image.digest, digest);
      assert.equal(image.status, 'ready');
    }
  },
  async create_by_short_name() {
    const instance = await client.instances.create({
      name,
      image: 'tiny',
      size: '256MB',
      overlay_size: '64MB',
      env: { SDK: 'typescript' },
      tags: { sdk: 'typescript', run: name },
    });
    id = instance.id;
    assert.equal(id.length, 24);
    assert.equal(instance.image, 'docker.io/library/tiny:latest');
    assert.ok(['Created', 'Initializing', 'Running'].includes(instance.state), instance.state);
    assert.equal(instance.current_phase, instance.state.toLowerCase());
  },
  async wait_for_running() {
    let answer = await client.instances.wait(id, { state: 'Running', timeout: '90s' }, { timeout: 100_000 });
    assert.equal(answer.state, 'Running');
    assert.equal(answer.timed_out, false);
    answer = await client.instances.wait(id, { state: 'Stopped', timeout: '200ms' });
    assert.equal(answer.timed_out, true);
  },
  async create_by_tag_and_digest() {
    for (const image of ['tiny:latest', `docker.io/library/tiny@${digest}`]) {
      const instance = await client.instances.create({ name: `${name}-form`, image, size: '256MB', overlay_size: '64MB' });
      assert.ok(instance.image.startsWith('docker.io/library/tiny'), instance.image);
      await client.instances.delete(instance.id);
    }
  },
  async get_by_id_name_prefix() {
    for (const key of [id, name, id.slice(0, 20)]) {
      const instance = await client.instances.get(key);
      assert.equal(instance.id, id);
      assert.equal(instance.state, 'Running');
      assert.ok(instance.network.ip && instance.network.mac);
      const total = Object.values(instance.phase_durations_ms).reduce((a, b) => a + b, 0);
      const age = Date.now() - Date.parse(instance.created_at);
      assert.ok(Math.abs(age - total) < 2000, `${age} against ${total}`);
    }
  },
  async list_with_filters() {
    const ids = async (query) => (await client.instances.list(query)).map((instance) => instance.id);
    assert.ok((await ids()).includes(id));
    assert.deepEqual(await ids({ tags: { sdk: 'typescript', run: name } }), [id]);
    assert.deepEqual(await ids({ tags: { run: name }, state: 'Running' }), [id]);
    assert.deepEqual(await ids({ tags: { run: name }, state: 'Stopped' }), []);
    assert.deepEqual(await ids({ tags: { run: 'another' } }), []);
  },
  async logs() {
    const lines = await collect(await client.instances.logs(id, { tail: 100 }));
    assert.ok(lines.includes('program runs'), String(lines));
    for (const source of ['vmm', 'hypeman']) {
      for (const line of await collect(await client.instances.logs(id, { source }))) assert.equal(typeof line, 'string');
    }
  },
  async logs_follow() {
    const stream = await client.instances.logs(id, { follow: true, tail: 0 });
    const stopping = client.instances.stop(id);
    let seen = false;
    for await (const line of stream) {
      if (line === 'program ends') {
        seen = true;
        break;
      }
    }
    assert.ok(seen, "the stream ended before the program's last words");
    assert.equal((await stopping).state, 'Stopped');
  },
  async stop_and_start() {
    const stopped = await client.instances.stop(id);
    assert.equal(stopped.state, 'Stopped');
    assert.equal(stopped.exit_code, 0);
    const started = await client.instances.start(id, {});
    assert.ok(['Initializing', 'Running'].includes(started.state), started.state);
    await client.instances.wait(id, { state: 'Running', timeout: '90s' }, { timeout: 100_000 });
    assert.equal((await client.instances.start(id, {})).state, 'Running');
  },
  async standby_and_restore() {
    const durations = (instance) => {
      const total = Object.values(instance.phase_durations_ms).reduce((a, b) => a + b, 0);
      const age = Date.now() - Date.parse(instance.created_at);
      assert.ok(Math.abs(age - total) < 2000, `${age} against ${total}`);
      return instance.phase_durations_ms;
    };
    const before = await client.instances.get(id);
    assert.equal(before.has_snapshot, false);
    const waiting = client.instances.wait(id, { state: 'Standby', timeout: '60s' }, { timeout: 70_000 });
    const asleep = await client.instances.standby(id);
    const reached = await waiting;
    assert.equal(reached.state, 'Standby');
    assert.equal(reached.timed_out, false);
    assert.equal(asleep.state, 'Standby');
    assert.equal(asleep.current_phase, 'standby');
    assert.equal(asleep.has_snapshot, true);
    assert.deepEqual(asleep.network, before.network);
    for (const phase of ['running', 'paused', 'standby']) assert.ok(phase in durations(asleep), phase);
    const listed = await client.instances.list({ tags: { run: name }, state: 'Standby' });
    assert.deepEqual(listed.map((instance) => instance.id), [id]);
    // It will not be Running without a command; the answer does not keep anybody waiting.
    const answer = await client.instances.wait(id, { state: 'Running', timeout: '60s' }, { timeout: 5_000 });
    assert.equal(answer.state, 'Standby');
    assert.equal(answer.timed_out, false);

    const awake = await client.instances.restore(id);
    assert.equal(awake.state, 'Running');
    assert.equal(awake.current_phase, 'running');
    assert.equal(awake.has_snapshot, false);
    assert.equal(awake.started_at, before.started_at);
    assert.deepEqual(awake.network, before.network);
    assert.ok(durations(awake).standby >= durations(asleep).standby);
  },
  async standby_no_ops_and_conflicts() {
    const { instances } = client;
    // One request, success, and the same phase entered at the same time.
    const unchanged = async (call) => {
      const before = await instances.get(id);
      const sent = requests.length;
      const after = await call();
      assert.equal(requests.length, sent + 1, `requests: ${requests.slice(sent)}`);
      assert.equal(after.state, before.state);
      assert.equal(after.current_phase_since, before.current_phase_since);
      assert.deepEqual(Object.keys(after.phase_durations_ms), Object.keys(before.phase_durations_ms));
    };
    const conflict = (call) => refused(sdk.ConflictError, 409, 'invalid_state', call);
    await unchanged(() => instances.restore(id));
    await conflict(() => instances.start(id, { discard_memory: true }));
    const malformed = { compression_delay: 'soon' };
    let message = await refused(sdk.BadRequestError, 400, 'invalid_field', () => instances.standby(id, malformed));
    assert.ok(message.includes('compression_delay') && message.includes('soon'), message);
    assert.equal((await instances.get(id)).state, 'Running');

    await instances.standby(id);
    await unchanged(() => instances.standby(id));
    await unchanged(() => instances.standby(id, {}));
    await unchanged(() => instances.standby(id, { compression: { enabled: false } }));
    for (const call of [() => instances.start(id, {}), () => instances.start(id, { cmd: ['true'] }), () => instances.stop(id)]) {
      message = await conflict(call);
      assert.ok(message.includes('Standby') && message.includes('restore'), message);
    }

    const started = await instances.start(id, { discard_memory: true });
    assert.ok(['Initializing', 'Running'].includes(started.state), started.state);
    assert.equal(started.has_snapshot, false);
    await instances.wait(id, { state: 'Running', timeout: '90s' }, { timeout: 100_000 });
    await instances.stop(id);
    for (const call of [() => instances.standby(id), () => instances.restore(id)]) {
      message = await conflict(call);
      assert.ok(message.includes('Stopped') && message.includes('start'), message);
    }
    await instances.start(id, {});
    await instances.wait(id, { state: 'Running', timeout: '90s' }, { timeout: 100_000 });
  },
  // Who decides, when it begins, and what readers see of it; with an instance of its own.
  async compression() {
    const { instances, snapshots } = client;
    const wanted = { enabled: true, algorithm: 'lz4', level: 1 };
    const made = await instances.create({
      name: `${name}-packed`,
      image: 'tiny',
      size: '256MB',
      overlay_size: '64MB',
      snapshot_policy: { compression: wanted, standby_compression_delay: '60m' },
    });
    await instances.wait(made.id, { state: 'Running', timeout: '90s' }, { timeout: 100_000 });
    const shown = (await instances.get(made.id)).snapshot_policy;
    assert.deepEqual(shown, { compression: wanted, standby_compression_delay: '1h0m0s' });

    const kept = async () => (await instances.get(made.id)).standby_compression;
    const until = async (look, done) => {
      const end = Date.now() + 300_000;
      for (;;) {
        const found = await look();
        if (done(found)) return found;
        assert.ok(Date.now() < end, JSON.stringify(found));
        await new Promise((resolve) => setTimeout(resolve, 50));
      }
    };
    const whole = 256 * 2 ** 20;
    const zstd = { enabled: true, algorithm: 'zstd', level: 3 };
    for (const [options, config, state] of [
      [{}, wanted, 'pending'],
      [{ compression: { enabled: true } }, { enabled: true, algorithm: 'zstd', level: 1 }, 'pending'],
      [{ compression: zstd, compression_delay: '1h' }, zstd, 'pending'],
      [{ compression: zstd, compression_delay: '0s' }, zstd, 'compressed'],
      [{ compression_delay: '0s' }, wanted, 'compressed'],
      [{ compression: { enabled: false, level: 99 }, compression_delay: '1ms' }, undefined, undefined],
    ]) {
      assert.equal((await instances.standby(made.id, options)).state, 'Standby');
      const found = await until(kept, (found) => found?.state === state);
      assert.deepEqual(found?.compression, config, JSON.stringify(options));
      assert.equal(found?.error, undefined);
      if (config) assert.equal(found.uncompressed_size_bytes, whole);
      if (state === 'compressed') assert.ok(found.compressed_size_bytes > 0 && found.compressed_size_bytes < whole);
      else assert.equal(found?.compressed_size_bytes, undefined);
      assert.equal((await instances.restore(made.id, { timeout: 100_000 })).state, 'Running');
      assert.equal(await kept(), undefined);
    }

    for (const [options, config] of [
      [{}, wanted],
      [{ compression: zstd }, zstd],
      [{ compression: { enabled: false } }, undefined],
    ]) {
      const taken = await instances.snapshots.create(made.id, { kind: 'Standby', ...options }, { timeout: 100_000 });
      assert.equal(taken.uncompressed_size_bytes, whole);
      assert.deepEqual(taken.compression, config);
      if (config) {
        assert.ok(['compressing', 'compressed'].includes(taken.compression_state), taken.compression_state);
        // It never waits, whatever the instance's delay.
        const compressed = (snapshot) => snapshot.compression_state === 'compressed';
        const done = await until(() => snapshots.get(taken.id), compressed);
        assert.ok(done.compressed_size_bytes > 0 && done.compressed_size_bytes < done.size_bytes, JSON.stringify(done));
        assert.ok(done.size_bytes < taken.size_bytes || taken.compression_state === 'compressed', JSON.stringify(done));
      } else {
        assert.equal(taken.compression_state, 'none');
        assert.equal(taken.compressed_size_bytes, null);
      }
      const again = await instances.snapshots.restore(taken.id, { id: made.id }, { timeout: 100_000 });
      assert.equal(again.state, 'Running');
      await snapshots.delete(taken.id);
    }

    const bad = (code, call) => refused(sdk.BadRequestError, 400, code, call);
    for (const [compression, code, word] of [
      [{ enabled: true, level: 20 }, 'invalid_field', '1 to 19'],
      [{ enabled: true, algorithm: 'lz4', level: 10 }, 'invalid_field', '0 to 9'],
      [{ enabled: true, algorithm: 'brotli' }, 'invalid_field', 'brotli'],
      [{ algorithm: 'zstd' }, 'missing_field', 'enabled'],
    ]) {
      for (const call of [
        () => instances.standby(made.id, { compression }),
        () => instances.snapshots.create(made.id, { kind: 'Standby', compression }),
        () => instances.create({ name: 'x', image: 'tiny', snapshot_policy: { compression } }),
      ]) {
        const message = await bad(code, call);
        assert.ok(message.includes('compression') && message.includes(word), message);
      }
    }
    for (const delay of ['soon', '-1s']) {
      for (const call of [
        () => instances.standby(made.id, { compression_delay: delay }),
        () => instances.create({ name: 'x', image: 'tiny', snapshot_policy: { standby_compression_delay: delay } }),
      ]) {
        const message = await bad('invalid_field', call);
        assert.ok(message.includes('compression_delay') && message.includes(delay), message);
      }
    }
    assert.equal((await instances.get(made.id)).state, 'Running');
    await instances.delete(made.id);
  },
  async snapshots_of_running() {
    const { instances, snapshots } = client;
    const before = await instances.get(id);
    const stopped = { kind: 'Stopped' };
    await refused(sdk.ConflictError, 409, 'invalid_state', () => instances.snapshots.create(id, stopped));
    const wanted = { kind: 'Standby', name: 'moment', tags: { run: name, of: 'running' } };
    moment = await instances.snapshots.create(id, wanted);
    assert.equal(moment.id.length, 24);
    assert.equal(moment.name, 'moment');
    assert.equal(moment.kind, 'Standby');
    assert.equal(moment.source_instance_id, id);
    assert.equal(moment.source_instance_name, name);
    assert.equal(moment.source_hypervisor, before.hypervisor);
    assert.deepEqual(moment.tags, wanted.tags);
    assert.equal(moment.compression_state, 'none');
    assert.equal(moment.compressed_size_bytes, null);
    assert.equal(moment.uncompressed_size_bytes, 256 * 2 ** 20);
    assert.ok(moment.size_bytes > moment.uncompressed_size_bytes);
    assert.equal(moment.scheduled, false);
    assert.ok(moment.allocated_bytes > 0 && moment.allocated_bytes <= moment.size_bytes, String(moment.allocated_bytes));
    assert.ok(Math.abs(Date.now() - Date.parse(moment.created_at)) < 60_000, moment.created_at);
    // The source has gone on.
    const after = await instances.get(id);
    assert.equal(after.state, 'Running');
    assert.equal(after.started_at, before.started_at);
    assert.deepEqual(after.network, before.network);
    const message = await refused(sdk.ConflictError, 409, 'name_conflict', () => instances.snapshots.create(id, wanted));
    assert.ok(message.includes('moment'), message);

    const ids = async (query) => (await snapshots.list(query)).map((snapshot) => snapshot.id);
    for (const key of [moment.id, moment.id.slice(0, 20)]) assert.equal((await snapshots.get(key)).id, moment.id);
    assert.ok((await ids()).includes(moment.id));
    const mine = { source_instance_id: id };
    assert.deepEqual(await ids({ ...mine, kind: 'Standby', name: 'moment', tags: { of: 'running' } }), [moment.id]);
    for (const other of [{ kind: 'Stopped' }, { name: 'another' }, { tags: { of: 'stopped' } }]) {
      assert.deepEqual(await ids({ ...mine, ...other }), [], JSON.stringify(other));
    }
  },
  async fork_of_running() {
    const { instances } = client;
    const source = await instances.get(id);
    let message = await refused(sdk.ConflictError, 409, 'invalid_state', () => instances.fork(id, { name: forkName }));
    assert.ok(message.includes('from_running'), message);
    const fork = await instances.fork(id, { name: forkName, from_running: true }, { timeout: 100_000 });
    assert.equal(fork.state, 'Running');
    assert.equal(fork.name, forkName);
    assert.notEqual(fork.id, id);
    assert.notEqual(fork.network.ip, source.network.ip);
    assert.notEqual(fork.network.mac, source.network.mac);
    assert.deepEqual(fork.env, source.env);
    // Its own time only, not its source's.
    const total = Object.values(fork.phase_durations_ms).reduce((a, b) => a + b, 0);
    const age = Date.now() - Date.parse(fork.created_at);
    assert.ok(Math.abs(age - total) < 2000, `${age} against ${total}`);
    const after = await instances.get(id);
    assert.equal(after.state, 'Running');
    assert.equal(after.started_at, source.started_at);
    assert.deepEqual(after.network, source.network);
    const taken = { name, from_running: true };
    message = await refused(sdk.ConflictError, 409, 'name_conflict', () => instances.fork(id, taken));
    assert.ok(message.includes(name), message);
    await instances.delete(fork.id);
  },
  // Back in place, then asleep; a sleeping source's copies are made without a boot.
  async restore_of_snapshots() {
    const { instances, snapshots } = client;
    const before = await instances.get(id);
    const again = await instances.snapshots.restore(moment.id, { id }, { timeout: 100_000 });
    assert.equal(again.id, id);
    assert.equal(again.state, 'Running');
    assert.deepEqual(again.network, before.network);
    const target = { id: name, target_state: 'Standby' };
    const asleep = await instances.snapshots.restore(moment.id, target, { timeout: 100_000 });
    assert.equal(asleep.state, 'Standby');
    assert.equal(asleep.has_snapshot, true);

    const second = await instances.snapshots.create(id, { kind: 'Standby' });
    assert.equal(second.name, null);
    await snapshots.delete(second.id);
    await refused(sdk.NotFoundError, 404, 'not_found', () => snapshots.get(second.id));
    await refused(sdk.NotFoundError, 404, 'not_found', () => snapshots.delete(second.id));
    for (const [make, state] of [
      [() => instances.fork(id, { name: forkName }), 'Standby'],
      [() => instances.fork(id, { name: forkName, target_state: 'Stopped' }), 'Stopped'],
      [() => snapshots.fork(moment.id, { name: forkName, target_state: 'Standby' }), 'Standby'],
      [() => snapshots.fork(moment.id, { name: forkName, target_state: 'Stopped' }), 'Stopped'],
    ]) {
      const fork = await make();
      assert.equal(fork.state, state);
      assert.equal(fork.has_snapshot, state === 'Standby');
      assert.notEqual(fork.id, id);
      // A fork's history is its own: the moment is its source's.
      const foreign = { id: fork.id, target_state: 'Stopped' };
      await refused(sdk.NotFoundError, 404, 'not_found', () => instances.snapshots.restore(moment.id, foreign));
      await instances.delete(fork.id);
    }
    assert.equal((await instances.get(id)).state, 'Standby');
  },
  // The moment brings the instance back to Running in the end, without a boot.
  async snapshots_of_stopped() {
    const { instances, snapshots } = client;
    const target = { id, target_state: 'Stopped' };
    const stopped = await instances.snapshots.restore(moment.id, target, { timeout: 100_000 });
    assert.equal(stopped.state, 'Stopped');
    assert.equal(stopped.has_snapshot, false);
    const standby = { kind: 'Standby' };
    await refused(sdk.ConflictError, 409, 'invalid_state', () => instances.snapshots.create(id, standby));
    disk = await instances.snapshots.create(id, { kind: 'Stopped', name: 'disk' });
    assert.equal(disk.kind, 'Stopped');
    assert.equal(disk.uncompressed_size_bytes, null);
    assert.ok(disk.size_bytes >= 64 * 2 ** 20, String(disk.size_bytes));
    for (const [make, hypervisor] of [
      [() => instances.fork(id, { name: forkName }), stopped.hypervisor],
      [() => snapshots.fork(disk.id, { name: forkName }), stopped.hypervisor],
      [() => snapshots.fork(disk.id, { name: forkName, target_hypervisor: 'qemu' }), 'qemu'],
    ]) {
      const fork = await make();
      assert.equal(fork.state, 'Stopped');
      assert.equal(fork.hypervisor, hypervisor);
      await instances.delete(fork.id);
    }
    assert.equal((await instances.snapshots.restore(disk.id, { id })).state, 'Stopped');
    for (const call of [
      () => instances.fork(id, { name: forkName, target_state: 'Standby' }),
      () => snapshots.fork(disk.id, { name: forkName, target_state: 'Standby' }),
      () => instances.snapshots.restore(disk.id, { id, target_state: 'Standby' }),
    ]) {
      const message = await refused(sdk.BadRequestError, 400, 'invalid_field', call);
      assert.ok(message.includes('target_state') && message.includes('Stopped, Running'), message);
    }
    const awake = await instances.snapshots.restore(moment.id, { id }, { timeout: 100_000 });
    assert.equal(awake.state, 'Running');
    assert.deepEqual(awake.network, stopped.network);
  },
  async snapshots_refused() {
    const { instances, snapshots } = client;
    const bad = (code, call) => refused(sdk.BadRequestError, 400, code, call);
    const unbuilt = (call) => refused(sdk.InternalServerError, 501, 'not_implemented', call);
    const missing = (call) => refused(sdk.NotFoundError, 404, 'not_found', call);
    const keep = (body, of = id) => () => instances.snapshots.create(of, body);
    await bad('invalid_name', keep({ kind: 'Standby', name: 'Not A Name' }));
    await bad('invalid_field', keep({ kind: 'Asleep' }));
    await bad('invalid_field', keep({ kind: 'Standby', tags: { '': 'x' } }));
    await bad('invalid_field', keep({ kind: 'Stopped', compression: { enabled: true } }));
    await bad('invalid_name', () => instances.fork(id, { name: '-' }));
    await bad('invalid_field', () => instances.fork(id, { name: 'x', target_state: 'Paused' }));
    await bad('invalid_name', () => snapshots.fork(moment.id, { name: '-' }));
    for (const [target_hypervisor, refuse] of [
      ['qemu', (call) => bad('invalid_field', call)],
      ['firecracker', unbuilt],
    ]) {
      for (const call of [
        () => snapshots.fork(moment.id, { name: 'x', target_hypervisor }),
        () => instances.snapshots.restore(moment.id, { id, target_hypervisor }),
      ]) {
        const message = await refuse(call);
        assert.ok(message.includes('target_hypervisor') && message.includes(target_hypervisor), message);
      }
    }
    await bad('invalid_field', () => snapshots.list({ kind: 'Asleep' }));
    await missing(() => snapshots.get('no-such-snapshot'));
    await missing(() => snapshots.fork('no-such-snapshot', { name: 'x' }));
    await missing(() => instances.fork('no-such-instance', { name: 'x' }));
    await missing(keep({ kind: 'Standby' }, 'no-such-instance'));
    await missing(() => instances.snapshots.restore('no-such-snapshot', { id }));
    await missing(() => instances.snapshots.restore(moment.id, { id: 'no-such-instance' }));
    assert.equal((await instances.get(id)).state, 'Running');
  },
  async snapshot_schedules() {
    const schedules = client.instances.snapshotSchedule;
    const missing = (call) => refused(sdk.NotFoundError, 404, 'not_found', call);
    await missing(() => schedules.get(id));
    const wanted = { interval: '90m', retention: { max_count: 3 }, metadata: { by: 'schedule' }, name_prefix: 'nightly' };
    const made = await schedules.update(id, wanted);
    assert.equal(made.instance_id, id);
    assert.equal(made.interval, '1h30m0s');
    assert.deepEqual(made.retention, wanted.retention);
    assert.deepEqual(made.metadata, wanted.metadata);
    assert.equal(made.name_prefix, 'nightly');
    for (const field of ['last_run_at', 'last_snapshot_id', 'last_error']) assert.equal(made[field], null, field);
    const ahead = Date.parse(made.next_run_at) - Date.now();
    assert.ok(ahead > 0 && ahead < 3 * 3_600_000, made.next_run_at);
    assert.deepEqual(await schedules.get(name), made);
    // Only another interval begins another cadence.
    const kept = await schedules.update(id, { interval: '90m', retention: { max_age: '36h' } });
    assert.equal(kept.next_run_at, made.next_run_at);
    assert.equal(kept.created_at, made.created_at);
    assert.deepEqual(kept.retention, { max_age: '36h0m0s' });
    const moved = await schedules.update(id, { interval: '24h', retention: { max_count: 1 } });
    assert.notEqual(moved.next_run_at, made.next_run_at);
    for (const [code, fields] of [
      ['invalid_field', { interval: '59s' }],
      ['invalid_field', { interval: '60' }],
      ['invalid_field', { retention: {} }],
      ['invalid_field', { retention: { max_count: 0 } }],
      ['invalid_field', { retention: { max_age: 'old' } }],
      ['invalid_field', { metadata: { '': 'x' } }],
      ['invalid_name', { name_prefix: 'a'.repeat(48) }],
    ]) {
      const body = { interval: '1h', retention: { max_count: 1 }, ...fields };
      const message = await refused(sdk.BadRequestError, 400, code, () => schedules.update(id, body));
      assert.ok(message.startsWith(Object.keys(fields)[0]), message);
    }
    assert.deepEqual(await schedules.get(id), moved);
    await schedules.delete(id);
    await missing(() => schedules.get(id));
    await missing(() => schedules.delete(id));
    await missing(() => schedules.update('no-such-instance', { interval: '1h', retention: { max_count: 1 } }));
  },
  async resources() {
    const found = await client.resources.get();
    for (const kind of ['cpu', 'memory', 'disk', 'network']) {
      const status = found[kind];
      assert.equal(status.type, kind);
      assert.equal(status.available, Math.max(0, status.effective_limit - status.allocated), kind);
    }
    assert.ok(found.cpu.capacity >= 1);
    assert.ok(found.memory.allocated >= 256 * 2 ** 20, String(found.memory.allocated));
    assert.ok(found.disk.capacity > found.disk.allocated && found.disk.allocated > 0);
    assert.equal(found.network.capacity, 0);
    assert.equal(found.gpu, null);
    const parts = found.disk_breakdown;
    assert.ok(parts.images_bytes > 0 && parts.overlays_bytes > 0 && parts.snapshots_bytes > 0, JSON.stringify(parts));
    const [mine, ...others] = found.allocations.filter((allocation) => allocation.instance_id === id);
    assert.deepEqual(others, []);
    assert.equal(mine.instance_name, name);
    assert.equal(mine.memory_bytes, 256 * 2 ** 20);
    assert.ok(mine.cpu >= 1 && mine.disk_bytes > 0, JSON.stringify(mine));
  },
  async conflict_is_not_retried() {
    const message = await refused(sdk.ConflictError, 409, 'name_conflict', () => client.instances.create({ name, image: 'tiny' }));
    assert.ok(message.includes(name), message);
    await refused(sdk.ConflictError, 409, 'invalid_state', () => client.instances.start(id, { cmd: ['true'] }));
    await refused(sdk.ConflictError, 409, 'in_use', () => client.images.delete('tiny'));
  },
  async bad_request() {
    const create = (fields) => client.instances.create({ name: 'x', image: 'tiny', ...fields });
    await refused(sdk.BadRequestError, 400, 'invalid_name', () => create({ name: 'Not A Name' }));
    await refused(sdk.BadRequestError, 400, 'invalid_size', () => create({ size: 'big' }));
    await refused(sdk.BadRequestError, 400, 'invalid_field', () => create({ no_such_field: 1 }));
    await refused(sdk.BadRequestError, 400, 'invalid_platform', () => create({ platform: 'linux/mips' }));
  },
  async not_found() {
    await refused(sdk.NotFoundError, 404, 'not_found', () => client.instances.get('no-such-instance'));
    await refused(sdk.NotFoundError, 404, 'not_found', () => client.images.get('no-such-image'));
    await refused(sdk.NotFoundError, 404, 'not_found', () => client.instances.create({ name: 'x', image: 'no/such:image' }));
  },
  async not_implemented_is_not_retried() {
    const error = sdk.InternalServerError;
    await refused(error, 501, 'not_implemented', () => client.volumes.list());
    await refused(error, 501, 'not_implemented', () => client.instances.stat(id, { path: '/' }));
    await refused(error, 501, 'not_implemented', () => client.instances.create({ name: 'x', image: 'tiny', ttl: '1h' }));
    assert.equal((await client.instances.get(id)).state, 'Running');
  },
  async unauthorized() {
    const stranger = countedClient({ apiKey: 'not.a.token' });
    await refused(sdk.AuthenticationError, 401, 'unauthorized', () => stranger.instances.list());
    assert.equal((await stranger.health.check()).status, 'ok');
  },
  async image_delete() {
    await client.images.delete('spare-typescript:1');
    await refused(sdk.NotFoundError, 404, 'not_found', () => client.images.get('spare-typescript:1'));
  },
  async delete() {
    await client.instances.delete(id, { graceful_shutdown: true });
    await refused(sdk.NotFoundError, 404, 'not_found', () => client.instances.get(id));
  },
  async snapshots_outlive_their_source() {
    const kept = await client.snapshots.list({ source_instance_id: id });
    assert.deepEqual(kept.map((snapshot) => snapshot.id), [moment.id, disk.id]);
    for (const snapshot of kept) {
      assert.equal(snapshot.source_instance_name, name);
      await client.snapshots.delete(snapshot.id);
    }
    assert.deepEqual(await client.snapshots.list({ source_instance_id: id }), []);
  },
};

integrity();
let passed = 0;
for (const [title, run] of Object.entries(cases)) {
  const started = Date.now();
  await run();
  passed += 1;
  console.log(`typescript: ${title} ... ok (${((Date.now() - started) / 1000).toFixed(1)}s)`);
}
console.log(`typescript: ${passed} passed, 0 failed, 0 skipped`);
