// Every status of automatic standby and its reason, through the published TypeScript client, unmodified.
//
// Environment: DOZE_URL, DOZE_TOKEN, DOZE_SDK_NODE_DIR; the image `tiny` exists; the server lets one instance at a
// time fall asleep. What the API cannot bring about is asked of whoever runs this: a line `@...` on stdout,
// answered by a line on stdin.
import assert from 'node:assert/strict';
import { randomBytes } from 'node:crypto';
import { createRequire } from 'node:module';
import net from 'node:net';
import path from 'node:path';
import readline from 'node:readline';
import { setTimeout as sleep } from 'node:timers/promises';

const require = createRequire(path.join(path.resolve(process.env.DOZE_SDK_NODE_DIR), 'from-here.js'));
const { default: Hypeman, ...sdk } = require('@onkernel/hypeman');

const requests = [];
const client = new Hypeman({
  apiKey: process.env.DOZE_TOKEN,
  baseURL: process.env.DOZE_URL,
  fetch: (url, init) => {
    requests.push(`${init?.method ?? 'GET'} ${new URL(url).pathname}`);
    return fetch(url, init);
  },
});
const { instances } = client;
const PORT = 7000;
const LISTENS = ['/bin/sh', '-c', `while :; do nc -l -p ${PORT}; done`];
const seen = new Set();
const run = randomBytes(4).toString('hex');
const answers = readline.createInterface({ input: process.stdin })[Symbol.asyncIterator]();

async function ask(what) {
  console.log(`@${what}`);
  assert.equal((await answers.next()).value, 'done', what);
}

async function status(key) {
  const found = await instances.autoStandby.status(key);
  seen.add(`${found.status} ${found.reason}`);
  return found;
}

async function reaches(key, word, reason) {
  const end = Date.now() + 90_000;
  for (;;) {
    const found = await status(key);
    if (found.status === word && found.reason === reason) return found;
    assert.ok(Date.now() < end, `not ${word}/${reason}: ${JSON.stringify(found)}`);
    await sleep(20);
  }
}

async function boot(name, fields = {}) {
  const request = { image: 'tiny', size: '256MB', overlay_size: '64MB', vcpus: 1, ...fields };
  const made = await instances.create({ name: `${name}-ts-${run}`, ...request });
  await instances.wait(made.id, { state: 'Running', timeout: '90s' }, { timeout: 100_000 });
  return instances.get(made.id);
}

const policy = (key, auto_standby) => instances.update(key, { auto_standby });

async function refused(Kind, status, code, call) {
  const before = requests.length;
  const failure = await call().then(() => undefined, (error) => error);
  assert.ok(failure instanceof Kind, `${failure}`);
  assert.equal(failure.status, status);
  assert.equal(failure.error?.code, code);
  assert.equal(requests.length, before + 1, String(requests.slice(before)));
  return failure.error.message;
}

async function policyAndStatus(one) {
  assert.equal(one.auto_standby, undefined);
  assert.equal((await reaches(one.id, 'disabled', 'policy_missing')).configured, false);
  assert.deepEqual((await policy(one.id, { enabled: false, idle_timeout: '5m' })).auto_standby, { enabled: false });
  assert.equal((await reaches(one.id, 'disabled', 'policy_disabled')).configured, true);
  await refused(sdk.BadRequestError, 400, 'missing_field', () => policy(one.id, { enabled: true }));
  await refused(sdk.BadRequestError, 400, 'invalid_request', () => instances.update(one.id, {}));
  const ttl = { ttl: '1h', auto_standby: { enabled: true, idle_timeout: '1m' } };
  await refused(sdk.InternalServerError, 501, 'not_implemented', () => instances.update(one.id, ttl));
  const { auto_standby } = await policy(one.id, {
    enabled: true,
    idle_timeout: '60m',
    ignore_source_cidrs: ['192.168.7.9/16', '10.255.0.0/16'],
    ignore_destination_ports: [9100, 22, 9100],
  });
  assert.deepEqual(auto_standby, {
    enabled: true,
    idle_timeout: '1h0m0s',
    ignore_source_cidrs: ['10.255.0.0/16', '192.168.0.0/16'],
    ignore_destination_ports: [22, 9100],
  });
  assert.deepEqual((await instances.get(one.id)).auto_standby, auto_standby);
  const listed = (await instances.list()).find((instance) => instance.id === one.id);
  assert.deepEqual(listed.auto_standby, auto_standby);
}

async function countdownAndActivity(one) {
  const idle = await reaches(one.id, 'idle_countdown', 'idle_timeout_not_elapsed');
  assert.ok(idle.eligible && idle.countdown_remaining && idle.next_standby_at && idle.idle_since);
  assert.equal(idle.tracking_mode, 'conntrack_events_v4_tcp');
  const socket = net.connect(PORT, one.network.ip);
  await new Promise((resolve, reject) => socket.once('connect', resolve).once('error', reject));
  const active = await reaches(one.id, 'active', 'active_inbound_connections');
  assert.equal(active.active_inbound_connections, 1);
  assert.equal(active.idle_since, null);
  socket.destroy();
  assert.ok((await reaches(one.id, 'idle_countdown', 'idle_timeout_not_elapsed')).last_inbound_activity_at);
  const held = await instances.autoStandby.hold(one.id);
  assert.ok(Date.parse(held.hold_until) > Date.now() + 3_500_000, held.hold_until);
  await policy(one.id, { enabled: true, idle_timeout: '300ms' });
  const again = await instances.autoStandby.hold(one.id);
  assert.ok(Date.parse(again.hold_until) < Date.parse(held.hold_until));
}

const one = await boot('one', { cmd: LISTENS });
const other = await boot('other');
const offline = await boot('offline', { network: { enabled: false }, auto_standby: { enabled: true, idle_timeout: '1m' } });
assert.equal((await reaches(offline.id, 'ineligible', 'network_disabled')).eligible, false);
await policyAndStatus(one);
await ask(`freeze ${other.id}`);
await policy(other.id, { enabled: true, idle_timeout: '200ms' });
await reaches(other.id, 'standby_requested', 'ready_for_standby');
await countdownAndActivity(one);
await reaches(one.id, 'ready_for_standby', 'ready_for_standby');
await ask('thaw');
for (const key of [one.id, other.id]) {
  const answer = await instances.wait(key, { state: 'Standby', timeout: '90s' }, { timeout: 100_000 });
  assert.equal(answer.state, 'Standby');
  assert.equal((await reaches(key, 'ineligible', 'instance_not_running')).eligible, false);
}
const message = await refused(sdk.ConflictError, 409, 'invalid_state', () => instances.autoStandby.hold(one.id));
assert.ok(message.includes('restore'), message);
await policy(one.id, { enabled: true, idle_timeout: '1h' });
await instances.restore(one.id);
await reaches(one.id, 'idle_countdown', 'idle_timeout_not_elapsed');
await ask('deaf');
await reaches(one.id, 'error', 'observer_error');
await reaches(one.id, 'idle_countdown', 'idle_timeout_not_elapsed');
await ask('blind');
const blind = await reaches(one.id, 'unsupported', 'unsupported_platform');
assert.equal(blind.supported, false);
assert.equal((await instances.autoStandby.hold(one.id)).status, 'unsupported');
await ask('see');
for (const key of [one.id, other.id, offline.id]) await instances.delete(key);
await refused(sdk.NotFoundError, 404, 'not_found', () => instances.autoStandby.status(one.id));
console.log(`typescript: ${seen.size} pairs of status and reason`);
process.exit(0);
