// What is shown of what is known. Every function returns descriptions of elements and changes nothing.

const ICONS = {
  check: 'M3 8.5l3.2 3.2L13 4.8',
  dash: 'M5 8h6',
  cross: 'M8 1.5a6.5 6.5 0 1 0 0 13a6.5 6.5 0 1 0 0-13M5.6 5.6l4.8 4.8M10.4 5.6l-4.8 4.8',
  alert: 'M8 2L1.5 13.5h13zM8 6.5v3.2M8 11.4v.3',
  info: 'M8 1.5a6.5 6.5 0 1 0 0 13a6.5 6.5 0 1 0 0-13M8 7.2v4M8 4.7v.3',
  clock: 'M8 1.5a6.5 6.5 0 1 0 0 13a6.5 6.5 0 1 0 0-13M8 4.5V8l2.4 1.6',
  dots: 'M3.5 8h.2M8 8h.2M12.5 8h.2',
  unknown: 'M6 6.2a2 2 0 1 1 2.9 1.8c-.6.3-.9.7-.9 1.4M8 11.6v.3',
  out: 'M2.5 8h10.5M9 4l4 4l-4 4',
  in: 'M13.5 8H3M7 4L3 8l4 4',
};
const icon = (name) => h('svg', { class: 'icon', viewBox: '0 0 16 16', 'aria-hidden': 'true' }, h('path', { d: ICONS[name] ?? ICONS.unknown }));
const unseen = (words) => h('span', { class: 'hidden' }, words);
const mono = (words) => h('code', null, words);
const pill = (kind, symbol, words) => h('span', { class: `pill ${kind}` }, icon(symbol), words);
const swatch = (name) => h('i', { class: `swatch ${name}`, 'aria-hidden': 'true' });

function statePill(guest) {
  const known = STATES[state(guest)];
  return pill(`state ${state(guest)}`, known?.icon ?? 'unknown', known?.word ?? state(guest));
}

function card(title, props, ...kids) {
  const id = `card-${title.toLowerCase().replace(/\W+/g, '-')}`;
  return h('section', { key: id, ...props, class: `card ${props?.class ?? ''}`, 'aria-labelledby': id }, h('h3', { id }, title), ...kids);
}

// `rows`: pairs of a term and what is to be said of it; a pair without anything to say is left out.
function facts(rows) {
  const known = rows.filter(([, value]) => value !== null && value !== undefined && value !== false);
  return h('dl', { class: 'facts' }, known.map(([term, value]) => h('div', { key: term }, h('dt', null, term), h('dd', null, value))));
}

// Explicit roles: a narrow screen shows rows as blocks, and a table that is no table to the style sheet would otherwise be none
// to a screen reader.
function table(caption, props, columns, rows) {
  const head = columns.map((column) => h('th', { scope: 'col', role: 'columnheader', class: column.class }, column.name));
  const body = rows.map((row) =>
    h('tr', { key: row.key, role: 'row', class: row.class, 'aria-current': row.current },
      row.cells.map((cell, at) => {
        const { name, class: kind, head: isHead } = columns[at];
        const attributes = { class: kind, 'data-label': name };
        return isHead ? h('th', { ...attributes, scope: 'row', role: 'rowheader' }, cell) : h('td', { ...attributes, role: 'cell' }, cell);
      })));
  return h('table', { ...props, role: 'table' },
    h('caption', { class: 'hidden' }, caption),
    h('thead', { role: 'rowgroup' }, h('tr', { role: 'row' }, head)),
    h('tbody', { role: 'rowgroup' }, body));
}

// A box that scrolls by itself; it takes the focus so that a keyboard can scroll it.
const scroller = (label, props, ...kids) => h('div', { ...props, class: `scroller ${props?.class ?? ''}`, tabindex: '0', role: 'region', 'aria-label': label }, ...kids);

function findingCard(finding) {
  const severity = SEVERITIES[finding.severity] ?? SEVERITIES.info;
  const past = finding.active === false;
  return h('li', { key: `${finding.code} ${finding.session}`, class: `finding ${past ? 'past' : text(finding.severity)}` },
    icon(severity.icon),
    h('div', null,
      h('p', { class: 'seen' }, h('b', null, `${severity.word}${past ? ', no longer active' : ''}: `), text(finding.seen)),
      h('p', null, text(finding.meaning)),
      finding.remedy && h('p', { class: 'remedy' }, h('b', null, 'What to do: '), text(finding.remedy)),
      h('p', { class: 'small' }, mono(text(finding.code)), number(finding.since) !== null && ` since ${clock(finding.since)}, session ${text(finding.session)}`)));
}

function findingList(guest) {
  const current = active(guest);
  const past = findings(guest).filter((finding) => finding.active === false);
  return h('section', { key: 'findings', class: 'findings', 'aria-label': 'Findings' },
    current.length > 0 && h('ul', { key: 'now' }, current.map(findingCard)),
    past.length > 0 && h('details', { key: 'past' },
      h('summary', null, `${plural(past.length, 'finding')} no longer active`),
      h('ul', null, past.map(findingCard))));
}

function steps(guest) {
  const reached = STATES[state(guest)]?.step ?? -1;
  const words = ['Waiting for a VMM', 'VMM connected', 'Features agreed', 'Rings running'];
  return h('ol', { class: 'steps', 'aria-label': 'Progress of the session' }, words.map((word, at) =>
    h('li', { class: at < reached ? 'done' : at === reached ? 'here' : 'ahead', 'aria-current': at === reached ? 'step' : null },
      h('span', null, word, at < reached && unseen(' (done)')))));
}

function peer(session) {
  const vmm = session?.peer;
  if (!vmm) return null;
  const ids = [['pid', vmm.pid], ['uid', vmm.uid], ['gid', vmm.gid]].filter(([, id]) => number(id) !== null);
  return [vmm.program ?? vmm.vmmHint ?? 'unknown program', h('span', { class: 'quiet' }, ` ${ids.map(([name, id]) => `${name} ${id}`).join(', ')}`)];
}

function guestView(guest) {
  const session = guest.session ?? {};
  const connected = session.connected ?? state(guest) !== 'waiting';
  return h('article', { key: guest.name, 'aria-labelledby': 'guest' },
    h('header', { class: 'guest' },
      h('h2', { id: 'guest' }, text(guest.name)),
      statePill(guest),
      h('p', { class: 'quiet' }, `CID ${text(guest.cid)}`,
        session.peer && [' · ', text(session.peer.program ?? session.peer.vmmHint ?? 'VMM')],
        connected && number(session.since) !== null && ` · connected ${duration(now() - session.since)}`)),
    steps(guest),
    findingList(guest),
    guest.device ? null : h('p', { key: 'silent', class: 'banner' }, icon('alert'),
      h('span', null, 'The device thread did not answer in time: its rings, translations and connections are not shown.')),
    connected ? null : howToConnect(guest, session),
    trafficCard(guest),
    h('div', { class: 'columns' },
      h('div', { class: 'column' }, connected && featureCard(session), memoryCard(session)),
      h('div', { class: 'column' }, connected && translationCard(guest), connected && ringCard(guest), sessionCard(session, connected))),
    guest.device && connectionCard(guest),
    recorderCard(session));
}

function howToConnect(guest, session) {
  const socket = text(session.socket) || '/path/to.sock';
  const client = session.mode === 'client';
  const end = session.lastEnd;
  return card('Waiting for a VMM', null,
    h('p', null, client ? 'The sidecar connects to ' : 'The sidecar listens on ', mono(socket), client ? ' as soon as a VMM listens there.' : '; the VMM connects to it.'),
    end && h('p', { key: 'end' }, h('b', null, `Session ${text(end.session)} ended: `), text(end.detail) || text(end.reason), ' ', mono(text(end.reason))),
    h('details', { key: 'how' }, h('summary', null, 'How to start QEMU'),
      h('pre', { tabindex: '0', 'aria-label': 'Arguments of QEMU' },
        '-object memory-backend-memfd,id=mem0,size=1G,share=on \\\n-machine q35,memory-backend=mem0 \\\n'
        + `-chardev socket,id=vsock0,path=${socket}${client ? ',server=on' : ''} \\\n-device vhost-user-vsock-pci,chardev=vsock0`),
      h('p', { class: 'small quiet' }, 'Guest memory must be shared (share=on), or the sidecar sees none of it.')));
}

function trafficCard(guest) {
  const last = latest(guest);
  const all = rules(guest);
  const big = (name, term, value, more) => h('div', { class: 'big' }, h('dt', null, swatch(name), term), h('dd', null, value, more && [' ', h('span', { class: 'quiet' }, more)]));
  return card('Traffic', { class: 'wide' },
    h('dl', { class: 'bigs' },
      big('up', 'guest → host', rate(last?.up), `${bytes(last?.total.up)} in all`),
      big('down', 'host → guest', rate(last?.down), `${bytes(last?.total.down)} in all`),
      big('open', 'open connections', integer(open(guest)))),
    h('div', { class: 'plots' }, throughput(guest), connectionPlot(guest)),
    all.length === 0 ? h('p', { class: 'quiet' }, 'No rules: this guest reaches nothing, and nothing reaches it.')
      : table('Rules, with their traffic', { class: 'rules' }, [
        { name: 'Rule', head: true }, { name: 'From and to' }, { name: 'Open', class: 'n' }, { name: 'Opened', class: 'n' }, { name: 'Refused', class: 'n' },
        { name: 'guest → host', class: 'n' }, { name: 'host → guest', class: 'n' }, { name: 'Last 5 min', class: 'sparks' },
      ], all.map((rule) => ruleRow(guest, rule))));
}

function ruleRow(guest, rule) {
  const traffic = rule.traffic ?? {};
  const speed = latest(guest)?.rates.get(rule.key);
  const [first, last] = values(rule.ports);
  const ports = first === last ? `guest port ${text(first)}` : `guest ports ${text(first)}–${text(last)}`;
  const path = rule.direction === 'out' ? [ports, ' → ', mono(text(rule.to))]
    : [mono(text(rule.listen)), ' → ', rule.protocol === 'connect' ? 'the port that the client asks for' : `guest port ${text(rule.port)}`];
  return { key: rule.key, cells: [
    h('span', { class: 'rule' }, icon(rule.direction), unseen(rule.direction === 'out' ? 'outbound ' : 'inbound '), text(rule.name)),
    [path, traffic.shared && h('span', { class: 'small quiet' }, ' (counted together with other rules)')],
    integer(traffic.active), integer(traffic.opened),
    h('span', { class: traffic.refused > 0 ? 'bad' : null }, integer(traffic.refused)),
    rate(speed?.up), rate(speed?.down), sparkline(guest, rule.key),
  ] };
}

const MEANINGS = {
  stream: 'stream sockets', seqpacket: 'sockets that keep messages apart', no_implied_stream: 'stream is not taken for granted',
  log_all: 'dirty pages are logged for a migration', ring_indirect_desc: 'descriptor tables outside the ring', ring_event_idx: 'fewer notifications',
  protocol_features: 'vhost-user has features of its own', version_1: 'modern device', access_platform: 'addresses may need translation',
  in_order: 'buffers are used in order', ring_packed: 'packed ring layout', order_platform: 'memory barriers of the platform', ring_reset: 'single rings can be reset',
};

function mark(value) {
  if (value === true) return h('span', { class: 'mark yes' }, icon('check'), unseen('yes'));
  if (value === false) return h('span', { class: 'mark no' }, icon('dash'), unseen('no'));
  return h('span', { class: 'mark' }, icon('unknown'), unseen('not known yet'));
}

// An older sidecar has no matrix, only the two sets that it is made of.
function features(session) {
  if (Array.isArray(session.features)) return list(session.features);
  const offered = values(session.featuresOffered?.names);
  const acked = values(session.featuresAcked?.names);
  return [...new Set([...offered, ...acked])].map((name) => ({ name, offered: offered.includes(name), vmm: acked.includes(name), driver: null, effective: null }));
}

function featureCard(session) {
  const rows = features(session);
  const protocol = session.protocol ?? session.layers?.protocol ?? { offered: session.protocolFeaturesOffered, acknowledged: session.protocolFeaturesAcked };
  const offered = values(protocol?.offered?.names);
  const acked = values(protocol?.acknowledged?.names);
  const names = [...new Set([...offered, ...acked])];
  return card('Features', null,
    rows.length === 0 ? h('p', { class: 'quiet' }, 'None are agreed yet.')
      : table('Virtio features: who offered and acknowledged them, and whether they are in effect', { class: 'matrix' }, [
        { name: 'Feature', head: true }, { name: 'Device', class: 'c' }, { name: 'VMM', class: 'c' }, { name: 'Driver', class: 'c' }, { name: 'In effect', class: 'c' },
      ], rows.map((feature) => ({
        key: feature.name, class: feature.effective ? 'on' : null,
        cells: [
          [h('span', { class: 'feature' }, text(feature.name).split('_').map((part, at) => [at > 0 && ['_', h('wbr')], part])), h('span', { class: 'small quiet' }, [number(feature.bit) !== null && `bit ${feature.bit}`, MEANINGS[feature.name]].filter(Boolean).join(': '))],
          mark(feature.offered), mark(feature.vmm), mark(feature.driver), mark(feature.effective),
        ],
      }))),
    h('h4', null, 'vhost-user protocol features'),
    names.length === 0 ? h('p', { class: 'quiet' }, 'None are agreed yet.')
      : h('ul', { class: 'chips' }, names.map((name) => {
        const [kind, symbol, words] = !offered.includes(name) ? ['bad', 'cross', 'acknowledged, not offered']
          : acked.includes(name) ? ['taken', 'check', 'acknowledged'] : ['left', 'dash', 'offered only'];
        return h('li', { key: name, class: `chip ${kind}` }, icon(symbol), name, unseen(` ${words}`));
      })));
}

const MODES = {
  none: ['plain', 'check', 'No translation'],
  undecided: ['plain', 'clock', 'Undecided'],
  identity: ['plain', 'check', 'Identity: addresses are taken as they are'],
  translate: ['good', 'check', 'Translated by the IOTLB'],
};

function translationCard(guest) {
  const access = guest.session?.accessPlatform;
  if (!access) return null;
  const iotlb = guest.device?.iotlb;
  const [kind, symbol, words] = MODES[access.mode] ?? ['plain', 'unknown', text(access.mode)];
  const used = access.mode === 'translate' || access.updates > 0 || access.refusedMessages > 0 || iotlb?.entries > 0;
  const share = iotlb?.lookups > 0 ? `${(Math.floor(10000 * iotlb.hits / iotlb.lookups) / 100).toFixed(2)} % of ${integer(iotlb.lookups)} lookups` : null;
  const oldest = number(iotlb?.oldestUnansweredSeconds) === null ? '' : `, the oldest for ${duration(iotlb.oldestUnansweredSeconds)}`;
  const faults = (iotlb?.faultsRead ?? 0) + (iotlb?.faultsWrite ?? 0);
  return card('Address translation', null,
    h('p', { class: 'mode' }, pill(kind, symbol, words), h('span', { class: 'small quiet' }, 'accessPlatform: ', mono(text(access.policy)))),
    access.why && h('p', { key: 'why', class: 'sentence' }, text(access.why), ' ', h('span', { class: 'small quiet' }, 'evidence: ', mono(text(access.evidence)))),
    facts([
      ['Backend channel', access.backendChannel === undefined ? null : access.backendChannel ? 'open' : 'none'],
      ...(used ? [
        ['Mappings', iotlb && `${integer(iotlb.entries)} of at most ${integer(iotlb.capacity)}, ${memory(iotlb.mappedBytes)}`],
        ['Found', share],
        ['Misses sent', `${integer(access.missesSent)}, ${integer(access.missesRefused)} refused`],
        ['Unanswered', iotlb && h('span', { class: iotlb.unanswered > 0 ? 'bad' : null }, `${integer(iotlb.unanswered)}${oldest}`)],
        ['Messages', `${plural(access.updates, 'update')}, ${plural(access.invalidations, 'invalidation')}, ${integer(access.refusedMessages)} refused`],
        ['Forgotten', iotlb && `${plural(iotlb.flushes, 'flush', 'flushes')}, ${plural(iotlb.evictions, 'eviction')}`],
        ['Faults', iotlb && h('span', { class: faults > 0 ? 'bad' : null }, `${integer(iotlb.faultsRead)} reading, ${integer(iotlb.faultsWrite)} writing`)],
      ] : []),
    ]));
}

function ringCard(guest) {
  const rings = list(guest.session?.rings);
  if (rings.length === 0) return null;
  const running = new Map(list(guest.device?.rings).map((ring) => [ring.queue, ring]));
  const held = { translation: 'waits for a translation', broken: 'broken' };
  const status = (ring) => {
    const by = running.get(ring.queue)?.heldBy;
    if (by) return h('span', { class: 'bad' }, icon('alert'), held[by] ?? by);
    return ring.started ? (ring.enabled === false ? 'started, disabled' : 'running') : ring.enabled ? 'enabled' : 'off';
  };
  const device = (name) => (ring) => integer(running.get(ring.queue)?.[name]);
  const descriptors = (ring) => [['kick', ring.hasKick], ['call', ring.hasCall], ['err', ring.hasErr]].filter(([, has]) => has).map(([name]) => name).join(', ') || 'none';
  const rows = [
    ['State', status], ['Entries', (ring) => integer(ring.size)], ['Layout', (ring) => text(ring.layout) || 'split'],
    ['Addresses', (ring) => ((running.get(ring.queue)?.translated ?? ring.translated) ? 'I/O virtual' : 'of the VMM')],
    ['Available', device('available')], ['Next available', device('nextAvail')], ['Next used', device('nextUsed')],
    ['Descriptors', (ring) => mono(hex(ring.desc))], ['Available ring', (ring) => mono(hex(ring.avail))], ['Used ring', (ring) => mono(hex(ring.used))],
    ['Eventfds', descriptors],
  ];
  return card('Rings', null, table('Rings, one a column', { class: 'rings' },
    [{ name: 'Ring', head: true }, ...rings.map((ring) => ({ name: text(ring.queue) }))],
    rows.map(([name, cell]) => ({ key: name, cells: [name, ...rings.map(cell)] }))));
}

function memoryCard(session) {
  const regions = list(session.memory);
  if (regions.length === 0) return null;
  return card('Memory', null,
    h('p', null, `${memory(sum(regions.map((region) => region.size)))} in ${plural(regions.length, 'region')}`, session.dirtyLogActive && ', dirty pages are logged'),
    scroller('Memory regions', { class: 'low' }, table('Memory regions', null, [{ name: 'Guest address', head: true }, { name: 'Size', class: 'n' }, { name: 'VMM address' }],
      regions.map((region) => ({ key: region.guestAddress, cells: [mono(hex(region.guestAddress)), memory(region.size), mono(hex(region.userAddress))] })))));
}

function sessionCard(session, connected) {
  const errors = list(session.sessionErrors).filter((error) => error.count > 0).map((error) => `${integer(error.count)} ${error.reason}`);
  const requests = list(session.requests).filter((request) => request.count > 0);
  const end = session.lastEnd;
  return card('Session', null,
    facts([
      ['VMM', peer(session)],
      ['Socket', session.socket && [mono(text(session.socket)), h('span', { class: 'quiet' }, session.mode === 'client' ? ' the VMM listens' : ' we listen')]],
      ['Session', session.session > 0 && `number ${integer(session.session)} of ${integer(session.sessionsTotal ?? session.session)}${session.assumed ? ', taken over in the middle' : ''}`],
      ['Queues asked for', session.queueCount > 0 && integer(session.queueCount)],
      ['Ended by errors', errors.length > 0 && errors.join(', ')],
      ['Turned away', session.rejectedConnections > 0 && `${integer(session.rejectedConnections)} while another VMM had the session`],
      ['Last end', end && connected && [`session ${text(end.session)}: ${text(end.detail) || text(end.reason)} `, mono(text(end.reason))]],
    ]),
    requests.length > 0 && h('details', { key: 'requests' },
      h('summary', null, `${plural(sum(requests.map((request) => request.count)), 'request')} since the process began`),
      table('Requests by name', null, [{ name: 'Request', head: true }, { name: 'Count', class: 'n' }, { name: 'Errors', class: 'n' }],
        requests.map((request) => ({ key: request.request, cells: [mono(text(request.request)), integer(request.count), integer(request.errors)] })))));
}

const PAGE = 25;

function connectionCard(guest) {
  const all = list(guest.device.connections);
  const count = open(guest) ?? all.length;
  if (all.length === 0) return card('Connections', { class: 'wide' }, h('p', { class: 'quiet' }, 'None are open.'));
  const limit = model.shown.connections ?? PAGE;
  const shown = all.slice(0, limit);
  return card('Connections', { class: 'wide' },
    h('p', { class: 'quiet' }, shown.length < count ? `${integer(shown.length)} of ${integer(count)}` : plural(count, 'connection')),
    scroller('Connections', null, table('Open connections', null, [
      { name: 'Rule', head: true }, { name: 'Guest port', class: 'n' }, { name: 'Peer' }, { name: 'State' }, { name: 'guest → host', class: 'n' },
      { name: 'host → guest', class: 'n' }, { name: 'Waiting', class: 'n' }, { name: 'Credit', class: 'n' }, { name: 'Age', class: 'n' },
    ], shown.map((one) => {
      const out = one.openedBy !== 'host_to_guest';
      return { key: `${one.openedBy} ${one.guestPort} ${one.hostPort}`, cells: [
        h('span', { class: 'rule' }, icon(out ? 'out' : 'in'), unseen(out ? 'opened by the guest, ' : 'opened by the host, '), text(one.rule)),
        text(one.guestPort), mono(text(one.peer)), text(one.state).replaceAll('_', ' '),
        bytes(one.bytesFromGuest), bytes(one.bytesToGuest), bytes(one.buffered), memory(one.credit), duration(one.ageSeconds),
      ] };
    }))),
    shown.length < all.length && h('button', { key: 'more', type: 'button', on: { click: actions.more } }, `Show ${integer(Math.min(4 * PAGE, all.length - shown.length))} more`));
}

const DIRECTIONS = {
  vmm_to_device: 'VMM → device', device_to_vmm: 'device → VMM',
  backend_channel_out: 'device → VMM, backend channel', backend_channel_in: 'VMM → device, backend channel',
};
const BAD_OUTCOMES = ['nack', 'refused', 'ended_session'];

function recorderCard(session) {
  const messages = list(session.messages);
  if (messages.length === 0) return null;
  const seen = model.shown.recorder;
  return h('details', { key: 'recorder', class: 'card wide recorder', on: { toggle: actions.recorder } },
    h('summary', null, h('h3', null, 'Flight recorder'), ' ', h('span', { class: 'quiet' }, `the last ${plural(messages.length, 'message')} between VMM and device`)),
    seen && scroller('Messages, oldest first', { class: 'log' }, table('Messages between VMM and device, oldest first', null, [
      { name: 'Time' }, { name: 'Way' }, { name: 'Message', head: true }, { name: 'Particulars' }, { name: 'Outcome' },
    ], messages.map((message, at) => {
      const bad = BAD_OUTCOMES.includes(message.outcome);
      const begins = at > 0 && message.session !== messages[at - 1].session;
      return { key: `${message.session} ${message.at} ${message.request} ${message.direction}`, class: begins ? 'begins' : null, cells: [
        [clock(message.at, true), message.count > 1 && number(message.last) !== null && ` – ${clock(message.last, true)}`],
        DIRECTIONS[message.direction] ?? text(message.direction),
        [mono(text(message.request)), message.count > 1 && ` × ${integer(message.count)}`],
        text(message.detail),
        h('span', { class: bad ? 'bad' : null }, bad && icon('alert'), text(message.outcome).replaceAll('_', ' '), message.answer && `: ${message.answer}`),
      ] };
    }))));
}

const link = (guest) => `#guest=${encodeURIComponent(guest.name)}`;

function worst(guest) {
  const current = active(guest);
  if (current.length === 0) return h('span', { class: 'quiet' }, 'none');
  const [first] = current;
  return h('span', { class: `severity ${text(first.severity)}` }, icon(SEVERITIES[first.severity]?.icon), plural(current.length, text(SEVERITIES[first.severity]?.word ?? first.severity).toLowerCase(), 'findings'));
}

function overview(shown) {
  const all = guests();
  const rows = all.map((guest) => ({
    key: guest.name, current: guest === shown ? 'true' : null, class: guest === shown ? 'current' : null,
    cells: [
      h('a', { href: link(guest), 'aria-current': guest === shown ? 'true' : null }, text(guest.name)), text(guest.cid), statePill(guest),
      text(guest.session?.peer?.vmmHint ?? guest.session?.peer?.program) || '–', integer(open(guest)), rate(latest(guest)?.up), rate(latest(guest)?.down), worst(guest),
    ],
  }));
  return h('nav', { key: 'guests', class: 'card wide', 'aria-label': 'Guests' },
    h('h2', null, plural(all.length, 'guest')),
    scroller('Guests', { class: 'guests' }, table('Guests', { class: 'blocks' }, [
      { name: 'Guest', head: true }, { name: 'CID', class: 'n' }, { name: 'Session' }, { name: 'VMM' }, { name: 'Connections', class: 'n' },
      { name: 'guest → host', class: 'n' }, { name: 'host → guest', class: 'n' }, { name: 'Findings' },
    ], rows)));
}

// What became of the configuration's file, where somebody has to do something about it.
function configurationBanners() {
  const { lastReload: last, pending } = model.state.config ?? {};
  const banner = (key, kind, symbol, head, lines, more) => h('div', { key, class: `banner ${kind}` }, icon(symbol),
    h('div', null, h('b', null, head), ' ', more, h('ul', { class: 'small' }, lines.map((line) => h('li', { key: line }, line)))));
  const parts = [];
  if (last?.result === 'refused') {
    const lines = text(last.error).split('\n').filter((line) => line.trim() !== '');
    parts.push(banner('refused', 'bad', 'alert', 'The configuration is refused.', lines, `What ran before stays in use. Tried at ${clock(last.at)} (${text(last.cause)}):`));
  }
  const waiting = values(pending).map(text);
  if (waiting.length > 0) parts.push(banner('pending', '', 'clock', 'Not in effect yet.', waiting, 'Of the configuration, this waits:'));
  return parts;
}

function app() {
  const parts = [];
  if (model.failure) {
    parts.push(h('div', { key: 'failure', class: 'banner bad' }, icon('alert'),
      h('span', null, h('b', null, model.state ? 'Not up to date. ' : 'Nothing to show. '), model.failure, ' ',
        model.state && `What you see is of ${clock(model.received / 1000)}. `, `Tries again in ${duration(model.retry / 1000).replace('.0', '')}.`),
      h('button', { type: 'button', on: { click: actions.retry } }, 'Try now')));
  }
  if (!model.state) return [...parts, !model.failure && h('p', { class: 'quiet' }, 'Reading the state …')];
  if (model.state.draining) {
    parts.push(h('div', { key: 'draining', class: 'banner' }, icon('clock'),
      h('span', null, h('b', null, 'Draining. '), 'The sidecar is shutting down: connections that are open may end, new ones are refused.')));
  }
  parts.push(...configurationBanners());
  const shown = selected();
  if (guests().length > 1) parts.push(overview(shown));
  parts.push(shown ? guestView(shown) : h('p', null, 'No guests are configured.'));
  return parts;
}

function meta() {
  if (!model.state) return [];
  const { version, revision, startedAt, config } = model.state;
  return [h('span', null, `version ${text(version)}`), revision && h('code', null, text(revision).slice(0, 12)),
    number(startedAt) !== null && h('span', null, `up ${duration(now() - startedAt)}`),
    config?.sha256 && h('span', null, 'configuration ', h('code', null, text(config.sha256).slice(0, 12)), ` since ${clock(config.since)}`)];
}

function controls() {
  const [kind, symbol, word] = model.paused ? ['plain', 'clock', 'Paused'] : model.failure ? ['bad', 'alert', 'No answer'] : model.state ? ['good', 'check', 'Live'] : ['plain', 'dots', 'Loading'];
  return [pill(kind, symbol, word), h('button', { type: 'button', on: { click: actions.pause } }, model.paused ? 'Resume' : 'Pause')];
}
