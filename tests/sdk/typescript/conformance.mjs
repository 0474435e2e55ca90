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
let id;
let digest;

// Run in the order they are written; each may use what the former made.
const cases = {
  async health_and_capabilities() {
    assert.equal((await client.health.check()).status, 'ok');
    const capabilities = await client.capabilities.get();
    assert.equal(capabilities.default_runtime.available, true);
    for (const feature of ['instances', 'images', 'exec', 'logs']) assert.ok(capabilities.features.includes(feature));
    for (const runtime of capabilities.runtimes) assert.ok(runtime.features.includes('standby'), runtime.name);
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
    const compression = { enabled: true, algorithm: 'zstd' };
    let message = await refused(sdk.InternalServerError, 501, 'not_implemented', () => instances.standby(id, { compression }));
    assert.ok(message.includes('compression'), message);
    const malformed = { compression_delay: 'soon' };
    message = await refused(sdk.BadRequestError, 400, 'invalid_field', () => instances.standby(id, malformed));
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
    await refused(error, 501, 'not_implemented', () => client.instances.fork(id, { name: 'x' }));
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
