// What is known: the last document of /state, and how counters moved during the last minutes. Keys may be missing, since
// a page that stays open outlives the sidecar that served it.

const WINDOW = 300; // seconds that are plotted
const GAP = 12; // seconds between two samples beyond which nothing is known of the time between them

const values = (value) => (Array.isArray(value) ? value : []);
const list = (value) => values(value).filter((one) => typeof one === 'object' && one !== null);
const number = (value) => (typeof value === 'number' && Number.isFinite(value) ? value : null);
const text = (value) => (value === null || value === undefined ? '' : String(value));
const sum = (all) => all.reduce((total, value) => total + (number(value) ?? 0), 0);
const plural = (count, one, many) => `${integer(count)} ${count === 1 ? one : many ?? `${one}s`}`;

// Digits in groups of three by a thin space: readable for everybody, whatever the locale.
function integer(value) {
  return number(value) === null ? '–' : String(Math.round(value)).replace(/\B(?=(\d{3})+$)/g, '\u202f');
}

function scaled(value, step, units) {
  if (number(value) === null) return '–';
  let unit = 0;
  while (Math.abs(value) >= step && unit < units.length - 1) {
    value /= step;
    unit += 1;
  }
  return `${unit === 0 || value >= 100 ? Math.round(value) : value.toFixed(1)} ${units[unit]}`;
}
const bytes = (value) => scaled(value, 1000, ['B', 'kB', 'MB', 'GB', 'TB', 'PB']);
const memory = (value) => scaled(value, 1024, ['B', 'KiB', 'MiB', 'GiB', 'TiB', 'PiB']);
const rate = (value) => (number(value) === null ? '–' : `${bytes(value)}/s`);
const hex = (value) => (number(value) === null ? text(value) || '–' : `0x${value.toString(16)}`);

function duration(seconds) {
  if (number(seconds) === null) return '–';
  const s = Math.max(0, seconds);
  if (s < 10) return `${s.toFixed(1)} s`;
  if (s < 60) return `${Math.round(s)} s`;
  if (s < 3600) return `${Math.floor(s / 60)} min ${Math.floor(s % 60)} s`;
  if (s < 86400) return `${Math.floor(s / 3600)} h ${Math.floor((s % 3600) / 60)} min`;
  return `${Math.floor(s / 86400)} d ${Math.floor((s % 86400) / 3600)} h`;
}

// The reader's own time of day.
function clock(unix, millis) {
  if (number(unix) === null) return '–';
  const at = new Date(unix * 1000);
  const two = (value) => String(value).padStart(2, '0');
  const time = `${two(at.getHours())}:${two(at.getMinutes())}:${two(at.getSeconds())}`;
  return millis ? `${time}.${String(at.getMilliseconds()).padStart(3, '0')}` : time;
}

const model = {
  state: null, // the last document
  received: null, // when it came, ms since 1970
  failure: null, // why the last fetch failed
  failures: 0, // fetches that failed, one after the other
  retry: 0, // ms until the next
  paused: false,
  selected: null, // name of the guest that is shown
  history: new Map(), // name of a guest -> samples
  shown: {}, // what the user has opened: number of connections, flight recorder
};

const now = () => number(model.state?.now) ?? (model.received ?? 0) / 1000;
const guests = () => list(model.state?.guests);
const findings = (guest) => list(guest.session?.findings);
const rank = (finding) => SEVERITIES[finding.severity]?.rank ?? 0;
// The gravest first; among equals as they came.
const active = (guest) => findings(guest).filter((finding) => finding.active !== false).sort((a, b) => rank(b) - rank(a));
const state = (guest) => text(guest.session?.state) || 'unknown';
const open = (guest) => number(guest.device?.connectionCount);

const rules = (guest) => [
  ...list(guest.outbound).map((rule) => ({ ...rule, direction: 'out', key: `out ${text(rule.name)}` })),
  ...list(guest.inbound).map((rule) => ({ ...rule, direction: 'in', key: `in ${text(rule.name)}` })),
];

// Takes a document of /state that came at `at`, in seconds of a clock that only goes forward.
function accept(document, at) {
  if (document.startedAt !== model.state?.startedAt) model.history.clear(); // another process: its counters began at 0
  model.state = document;
  const names = new Set();
  for (const guest of guests()) {
    names.add(guest.name);
    const samples = model.history.get(guest.name) ?? [];
    samples.push(sample(guest, at, samples.at(-1)));
    while (samples[0].at < at - WINDOW - GAP) samples.shift();
    model.history.set(guest.name, samples);
  }
  for (const name of model.history.keys()) if (!names.has(name)) model.history.delete(name);
}

// Counters and rates of one moment. Rules that share a counter count once.
function sample(guest, at, before) {
  const counters = new Map();
  const shared = new Set();
  let up = 0;
  let down = 0;
  for (const rule of rules(guest)) {
    const traffic = rule.traffic;
    if (!traffic) continue;
    const counter = { up: number(traffic.bytesGuestToHost), down: number(traffic.bytesHostToGuest), active: number(traffic.active) };
    counters.set(rule.key, counter);
    if (traffic.shared && shared.has(rule.direction)) continue;
    if (traffic.shared) shared.add(rule.direction);
    up += counter.up ?? 0;
    down += counter.down ?? 0;
  }
  const total = counters.size > 0 ? { up, down } : { up: null, down: null };
  const elapsed = before && at > before.at && at - before.at <= GAP ? at - before.at : null;
  const speed = (counter, old) => ({
    up: elapsed && old ? change(counter.up, old.up, elapsed) : null,
    down: elapsed && old ? change(counter.down, old.down, elapsed) : null,
  });
  const rates = new Map();
  for (const [key, counter] of counters) rates.set(key, speed(counter, before?.counters.get(key)));
  return { at, counters, total, rates, open: open(guest), ...speed(total, before?.total) };
}

function change(value, before, elapsed) {
  return value === null || before === null || value < before ? null : (value - before) / elapsed;
}

const samples = (guest) => model.history.get(guest.name) ?? [];
const latest = (guest) => samples(guest).at(-1);

// The guest that is shown: the one that was chosen, else the one that needs attention most.
function selected() {
  const chosen = guests().find((guest) => guest.name === model.selected);
  if (chosen) return chosen;
  const urgency = (guest) => Math.max(0, ...active(guest).map(rank)) * 2 + (state(guest) === 'running');
  const [first] = [...guests()].sort((a, b) => urgency(b) - urgency(a));
  model.selected = first?.name ?? null;
  return first;
}

const SEVERITIES = {
  error: { rank: 3, word: 'Error', icon: 'cross' },
  warning: { rank: 2, word: 'Warning', icon: 'alert' },
  info: { rank: 1, word: 'Note', icon: 'info' },
};

const STATES = {
  waiting: { step: 0, word: 'Waiting', icon: 'clock' },
  connected: { step: 1, word: 'Connected', icon: 'dots' },
  negotiated: { step: 2, word: 'Negotiated', icon: 'dots' },
  running: { step: 3, word: 'Running', icon: 'check' },
};
