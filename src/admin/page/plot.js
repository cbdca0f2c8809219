// Plots, as inline SVG. They stretch with the page, so words stand beside them in HTML.

const WIDTH = 600;

// The smallest round number that holds every value.
function ceiling(values, least) {
  const top = Math.max(least, ...values);
  const power = 10 ** Math.floor(Math.log10(top));
  return [1, 1.5, 2, 3, 4, 5, 6, 8, 10].map((step) => step * power).find((step) => step >= top * 0.999);
}

// Runs of samples whose value is known.
function runs(points, value) {
  const all = [];
  let run = [];
  for (const point of points) {
    const last = run.at(-1);
    if (value(point) === null || (last && point.at - last.at > GAP)) {
      if (run.length > 0) all.push(run);
      run = [];
    }
    if (value(point) !== null) run.push(point);
  }
  if (run.length > 0) all.push(run);
  return all;
}

// A line, and the area between it and the base.
function curve(points, value, scale, base, name) {
  const end = points.at(-1)?.at ?? 0;
  const x = (point) => (WIDTH * (1 - (end - point.at) / WINDOW)).toFixed(1);
  const y = (point) => (base + value(point) * scale).toFixed(1);
  let line = '';
  let area = '';
  for (const run of runs(points, value)) {
    const path = run.map((point) => `${x(point)} ${y(point)}`).join('L');
    line += run.length > 1 ? `M${path}` : `M${path}h.1`;
    area += `M${x(run[0])} ${base}L${path}L${x(run.at(-1))} ${base}Z`;
  }
  return [h('path', { class: `area ${name}`, d: area }), h('path', { class: `line ${name}`, d: line })];
}

function canvas(height, label, ...kids) {
  return h('svg', { class: 'plot', viewBox: `0 0 ${WIDTH} ${height}`, preserveAspectRatio: 'none', role: 'img', 'aria-label': label }, ...kids);
}

const grid = (y, name) => h('path', { class: `grid ${name ?? ''}`, d: `M0 ${y}H${WIDTH}` });

// `top` and `bottom`: what the upper and the lower edge stand for.
function figure(caption, top, bottom, plot) {
  return h('figure', null,
    h('figcaption', null, caption, h('span', { 'aria-hidden': 'true' }, top)),
    plot,
    h('div', { class: 'axis', 'aria-hidden': 'true' }, h('span', null, '5 min ago'), h('span', null, bottom), h('span', null, 'now')));
}

// What leaves the guest goes up from the middle, what enters it goes down: two directions without two colours.
function throughput(guest) {
  const points = samples(guest);
  const top = ceiling(points.flatMap((point) => [point.up ?? 0, point.down ?? 0]), 1000);
  const last = latest(guest);
  const edge = rate(top).replace('.0 ', ' ');
  const label = `Throughput in the last five minutes. Now ${rate(last?.up)} from guest to host and ${rate(last?.down)} from host to guest.`;
  return figure('Throughput', `↑ guest → host, up to ${edge}`, `↓ host → guest, up to ${edge}`,
    canvas(200, label, grid(1), grid(100, 'zero'), grid(199),
      curve(points, (point) => point.up, -98 / top, 100, 'up'),
      curve(points, (point) => point.down, 98 / top, 100, 'down')));
}

function connectionPlot(guest) {
  const points = samples(guest);
  const top = ceiling(points.map((point) => point.open ?? 0), 5);
  const label = `Open connections in the last five minutes. Now ${integer(open(guest))}.`;
  return figure('Connections', `up to ${integer(top)}`, null,
    canvas(200, label, grid(1), grid(100), grid(199, 'zero'), curve(points, (point) => point.open, -197 / top, 199, 'open')));
}

function sparkline(guest, key) {
  const points = samples(guest).map((point) => ({ at: point.at, ...point.rates.get(key) }));
  const value = (name) => (point) => point[name] ?? null;
  const top = ceiling(points.flatMap((point) => [point.up ?? 0, point.down ?? 0]), 1000);
  return h('svg', { class: 'plot spark', viewBox: `0 0 ${WIDTH} 40`, preserveAspectRatio: 'none', 'aria-hidden': 'true' },
    grid(20, 'zero'), curve(points, value('up'), -19 / top, 20, 'up'), curve(points, value('down'), 19 / top, 20, 'down'));
}
