// Asks for /state and shows it.

const INTERVAL = 2000; // ms between two questions
const LONGEST = 30000; // ms between two questions when nobody answers
const PATIENCE = 5000; // ms for an answer

const find = (id) => document.getElementById(id);
let timer = 0;
let asking = null;

const actions = {
  pause() {
    model.paused = !model.paused;
    show();
    schedule(0);
  },
  retry() {
    schedule(0);
  },
  more() {
    model.shown.connections = (model.shown.connections ?? PAGE) + 4 * PAGE;
    show();
  },
  recorder(event) {
    model.shown.recorder = event.target.open;
    show();
    const log = document.querySelector('.log');
    if (log) log.scrollTop = log.scrollHeight;
  },
};

// Screen readers are told what changed, once; figures that move all the time are not read out.
const told = { news: null, failed: false };
function tell() {
  const words = [];
  if (told.failed !== Boolean(model.failure)) words.push(model.failure ? `No answer: ${model.failure}` : 'The sidecar answers again.');
  told.failed = Boolean(model.failure);
  const news = new Map();
  for (const guest of guests()) {
    news.set(JSON.stringify([guest.name]), [state(guest), `${guest.name}: ${STATES[state(guest)]?.word ?? state(guest)}`]);
    for (const finding of active(guest)) {
      const severity = SEVERITIES[finding.severity]?.word ?? 'Finding';
      news.set(JSON.stringify([guest.name, finding.code]), [severity, `${guest.name}: ${severity}: ${text(finding.seen)}`]);
    }
  }
  // What the page shows when it opens is read as the page.
  if (told.news) for (const [key, [what, sentence]] of news) if (told.news.get(key)?.[0] !== what) words.push(sentence);
  if (model.state) told.news = news;
  if (words.length > 0) patch(find('live'), words.slice(0, 5).map((word) => h('p', null, word)));
}

function show() {
  try {
    // A log that was read at its end goes on at its end.
    const log = document.querySelector('.log');
    const atEnd = log && log.scrollHeight - log.scrollTop - log.clientHeight < 4;
    patch(find('app'), app().filter(Boolean));
    tell();
    if (atEnd) log.scrollTop = log.scrollHeight;
  } catch (error) {
    console.error(error);
    patch(find('app'), [h('p', { class: 'banner bad' }, `This page cannot show what it received (${error.message}); /state has it as JSON.`)]);
  }
  patch(find('meta'), meta().filter(Boolean));
  patch(find('status'), controls());
  const errors = sum(guests().map((guest) => active(guest).filter((finding) => finding.severity === 'error').length));
  const title = model.failure ? 'No answer · vsock-sidecar' : errors > 0 ? `${plural(errors, 'error')} · vsock-sidecar` : 'vsock-sidecar';
  if (document.title !== title) document.title = title;
}

async function ask() {
  asking = new AbortController();
  const patience = setTimeout(() => asking?.abort(), PATIENCE);
  try {
    // Relative, so that the page also works behind a proxy's path.
    const response = await fetch('state', { cache: 'no-store', redirect: 'error', signal: asking.signal });
    const document = await response.json().catch(() => null);
    if (!response.ok || !document) throw new Error(`the sidecar answers ${response.status}${document?.error ? `, ${document.error}` : ''}.`);
    accept(document, performance.now() / 1000);
    model.received = Date.now();
    model.failure = null;
    model.failures = 0;
  } catch (error) {
    model.failures += 1;
    model.failure = error.name === 'AbortError' ? `The sidecar did not answer within ${PATIENCE / 1000} s.`
      : error instanceof TypeError ? 'The sidecar cannot be reached.' : error.message.replace(/^t/, 'T');
  } finally {
    clearTimeout(patience);
    asking = null;
  }
  model.retry = Math.min(LONGEST, INTERVAL * 2 ** Math.min(model.failures, 6));
  show();
  schedule(model.failures > 0 ? model.retry : INTERVAL);
}

// One question at a time, and none while nobody looks.
function schedule(delay) {
  clearTimeout(timer);
  if (model.paused || document.hidden || asking) return;
  timer = setTimeout(ask, delay);
}

function choose() {
  const name = location.hash.startsWith('#guest=') ? location.hash.slice('#guest='.length) : null;
  if (name === null) return;
  try {
    model.selected = decodeURIComponent(name);
  } catch {
    return; // a link that was cut off
  }
  model.shown = {};
  show();
}

document.addEventListener('visibilitychange', () => schedule(0));
window.addEventListener('hashchange', () => {
  choose();
  const heading = find('guest');
  if (location.hash.startsWith('#guest=') && heading) {
    heading.tabIndex = -1;
    heading.focus();
  }
});
choose();
show();
schedule(0);
