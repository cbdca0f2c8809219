// A document that follows its data. `h` describes an element, `patch` makes the children of an element what was described
// and touches nothing that is so already: focus, selection, scroll positions and open <details> outlive a poll.
//
// Text goes in as text nodes and attributes with setAttribute; there is no way from data to markup. The policy of the
// page (trusted-types 'none') holds this, whoever edits these files.

const SVG = 'http://www.w3.org/2000/svg';

// `props`: attributes; besides, `key` (identity among siblings) and `on` (listeners).
function h(tag, props, ...kids) {
  const shown = kids.flat(4).filter((kid) => kid !== null && kid !== undefined && kid !== false);
  // An object of the data that looks like a description is none: only this function makes them.
  return new Description(tag, props ?? {}, shown.map((kid) => (kid instanceof Description ? kid : { text: String(kid) })));
}

class Description {
  constructor(tag, props, kids) {
    Object.assign(this, { tag, props, kids });
  }
}

function patch(parent, kids) {
  const old = new Map();
  for (const node of parent.childNodes) old.set(node.vkey, node);
  const used = new Set();
  const counts = {};
  const next = kids.map((kid) => {
    const kind = kid.tag ?? '#text';
    let key = kid.props?.key === undefined ? `${kind}#${(counts[kind] = (counts[kind] ?? 0) + 1)}` : `${kind}=${kid.props.key}`;
    while (used.has(key)) key += '+';
    used.add(key);
    const node = old.get(key) ?? create(kid, parent);
    old.delete(key);
    node.vkey = key;
    update(node, kid);
    return node;
  });
  // First out, then in: what stays is not moved, since moving an element takes its focus.
  for (const node of old.values()) node.remove();
  let at = parent.firstChild;
  for (const node of next) {
    if (node === at) at = at.nextSibling;
    else parent.insertBefore(node, at);
  }
}

function create(kid, parent) {
  if (kid.tag === undefined) return document.createTextNode(kid.text);
  const inSvg = kid.tag === 'svg' || parent.namespaceURI === SVG;
  const node = inSvg ? document.createElementNS(SVG, kid.tag) : document.createElement(kid.tag);
  for (const type of Object.keys(kid.props.on ?? {})) node.addEventListener(type, (event) => node.von[type]?.(event));
  return node;
}

function update(node, kid) {
  if (kid.tag === undefined) {
    if (node.data !== kid.text) node.data = kid.text;
    return;
  }
  node.von = kid.props.on ?? {};
  const before = node.vprops ?? {};
  for (const name of new Set([...Object.keys(before), ...Object.keys(kid.props)])) {
    if (name === 'key' || name === 'on') continue;
    const value = kid.props[name];
    if (value === before[name]) continue;
    if (value === undefined || value === null || value === false) node.removeAttribute(name);
    else node.setAttribute(name, value === true ? '' : value);
  }
  node.vprops = kid.props;
  patch(node, kid.kids);
}
