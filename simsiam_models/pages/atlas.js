'use strict';
// The atlas: a map of images on a canvas, and lists beside it. No library, no request: all data stand in the page.

const $ = id => document.getElementById(id);
const data = JSON.parse($('data').textContent);
const { labels, tiles, k } = data, n = data.names.length;
const bytes = text => Uint8Array.from(atob(text), c => c.charCodeAt(0));
const decode = (text, Kind) => new Kind(bytes(text).buffer);
const near = decode(data.near, Uint32Array), cosines = decode(data.cosines, Uint16Array);
const maps = data.maps.map(map => decode(map.xy, Float32Array));  // x, y of each image, in 0 .. 1
const place = tiles && decode(tiles.place, Uint32Array), sizes = tiles && decode(tiles.sizes, Uint8Array);
const notes = new Map(data.findings.toReversed().map(finding => [finding.key, new Map(finding.rows)]));  // kind -> row -> text
const names = data.names.map((name, row) => data.spelled[row] ?? name);  // as they can be shown

const canvas = $('map'), pen = canvas.getContext('2d', { willReadFrequently: true });
const rows = Array.from(data.names.keys()), visible = new Uint8Array(n).fill(1), picked = new Uint8Array(n);
const view = { x: 0.5, y: 0.5, scale: 0 };  // centre; pixels for the width of the map
let xy = maps[0].slice(), width = 1, height = 1, fitted = 0, ratio = 1;
let cursor = -1, current = -1;  // the image under the pointer or of the arrow keys; the one whose nearest are listed
let found = [];  // [row, similarity or null] in the list
let pictures = Boolean(tiles), lassoing = false, path = [];  // path: points of the lasso

const counted = (count, noun) => `${count.toLocaleString('en')} ${noun}${count === 1 ? '' : 's'}`;
const say = text => { $('status').textContent = text; };
const make = (tag, properties = {}) => Object.assign(document.createElement(tag), properties);
const describe = row => [
  labels && data.classes[labels[row]], ...[...notes.values()].map(texts => texts.get(row)), picked[row] && 'selected',
].filter(Boolean).join(' · ');

// ---- Thumbnails: sheets are decoded where they are needed, and the least recently used ones are dropped ----

const PLACES = tiles ? tiles.columns ** 2 : 1;
const KEPT = tiles ? Math.max(8, Math.floor(256e6 / (4 * PLACES * tiles.side ** 2))) : 0;  // sheets in 256 MB
const sheets = new Map();  // number -> bitmap, or the promise of it; the last one is the one used last

function loadSheet(number) {
  if (!sheets.has(number)) {
    const jpeg = new Blob([bytes($('sheet' + number).textContent)], { type: 'image/jpeg' });
    sheets.set(number, createImageBitmap(jpeg).then(bitmap => {
      sheets.set(number, bitmap);
      redraw();
    }));
    const old = [...sheets].find(([, sheet]) => sheet.close);
    if (sheets.size > KEPT && old) { old[1].close(); sheets.delete(old[0]); }
  }
  return sheets.get(number);
}

/** Returns the arguments of drawImage for a thumbnail; null if it is not decoded yet, or there is none. */
function findTile(row) {
  if (!tiles || !sizes[2 * row]) return null;
  const number = Math.floor(place[row] / PLACES), at = place[row] % PLACES, sheet = loadSheet(number);
  if (!sheet.close) return null;
  sheets.delete(number);
  sheets.set(number, sheet);
  return [sheet, at % tiles.columns * tiles.side, Math.floor(at / tiles.columns) * tiles.side, ...sizeOf(row)];
}
const sizeOf = row => [sizes[2 * row], sizes[2 * row + 1]];

/** Draws a thumbnail of at most `side` pixels into a canvas of its own. */
async function drawTile(target, row, side) {
  target.dataset.row = row;
  target.width = 1;
  if (!tiles || !sizes[2 * row]) return;
  await loadSheet(Math.floor(place[row] / PLACES));
  const tile = findTile(row), grow = side / Math.max(...sizeOf(row));
  if (!tile || target.dataset.row !== String(row)) return;
  [target.width, target.height] = sizeOf(row).map(length => Math.max(2, length * grow));
  target.getContext('2d').drawImage(...tile, 0, 0, target.width, target.height);
}

// ---- The map ----

const SHAPES = [  // in a square of 12
  'M6 1a5 5 0 1 0 0 10a5 5 0 1 0 0-10z', 'M1.5 1.5h9v9h-9z', 'M6 .5L11.8 11H.2z', 'M6 0L12 6L6 12L0 6z'];
const COLOURS = 8, colours = {};
const shapeOf = label => Math.floor(label / COLOURS) % SHAPES.length, colourOf = label => label % COLOURS;
const labelOf = row => labels ? labels[row] : 0;
const sx = row => (xy[2 * row] - view.x) * view.scale + width / 2;
const sy = row => (xy[2 * row + 1] - view.y) * view.scale + height / 2;
const within = (row, edge) => {
  const x = sx(row), y = sy(row);
  return x > -edge && y > -edge && x < width + edge && y < height + edge;
};
// Classes follow one another in the files. In this order, which is always the same, none covers the others.
const mixed = row => Math.imul(row + 1, 2654435761) >>> 0, order = rows.slice().sort((a, b) => mixed(a) - mixed(b));
let frame = 0, shown = n, stamps = { radius: 0 }, image;  // image: the pixels of the map
let drawn = [];  // row, x, y, width and height of each thumbnail on the map
const spread = new Map();

function redraw() {
  frame ||= requestAnimationFrame(() => { frame = 0; draw(); });
}

function readColours() {
  const style = getComputedStyle(document.documentElement), read = name => style.getPropertyValue('--' + name);
  for (const name of ['faint', 'mark', 'pick', 'map', 'soft']) colours[name] = read(name);
  colours.classes = Array.from({ length: COLOURS }, (_, i) => read('c' + i));
  stamps.radius = 0;
  draw();
}

/** Rasters each mark once, in all colours and shapes: which pixels of the map it changes, and to what. */
function makeStamps(radius) {
  const side = 2 * Math.ceil((radius + 3) * ratio) + 2;
  const to = make('canvas', { width: side, height: side }).getContext('2d', { willReadFrequently: true });
  const raster = (shape, ...layers) => {
    to.resetTransform();
    to.clearRect(0, 0, side, side);
    for (const [colour, r] of layers) {
      to.setTransform(r * ratio / 6, 0, 0, r * ratio / 6, side / 2 - r * ratio, side / 2 - r * ratio);
      to.fillStyle = colour;
      to.fill(shape);
    }
    const all = new Uint32Array(to.getImageData(0, 0, side, side).data.buffer), used = [...all.keys()].filter(i => all[i]);
    return { places: used.map(i => Math.floor(i / side) * canvas.width + i % side), pixels: used.map(i => all[i]) };
  };
  const shapes = SHAPES.map(shape => new Path2D(shape)), square = new Path2D('M0 0h12v12H0z');
  stamps = {
    radius, half: side / 2, back: raster(square, [colours.map, side]).pixels[0],
    dots: colours.classes.map(colour => shapes.map(shape => raster(shape, [colour, radius]))),
    faint: shapes.map(shape => raster(shape, [colours.faint, 0.7 * radius])),
    rings: shapes.map(shape => raster(shape, [colours.pick, radius + 3], [colours.map, radius + 1.25])) };
}

/** Returns visible rows that stay `distance` apart on the map, so that their thumbnails do not cover one another. */
function spreadOut(distance) {
  if (spread.has(distance)) return spread.get(distance);
  const cells = new Map(), around = [-1, 0, 1].flatMap(i => [-1, 0, 1].map(j => 65536 * i + j));
  const kept = order.filter(row => {
    const x = xy[2 * row], y = xy[2 * row + 1], cell = 65536 * Math.floor(x / distance) + Math.floor(y / distance);
    const covers = other => Math.max(Math.abs(xy[2 * other] - x), Math.abs(xy[2 * other + 1] - y)) < distance;
    if (!visible[row] || around.some(by => cells.get(cell + by)?.some(covers))) return false;
    cells.set(cell, [...cells.get(cell) ?? [], row]);
    return true;
  });
  spread.set(distance, kept);
  return kept;
}

function draw() {
  const zoom = view.scale / fitted, size = Math.min(7, Math.max(1.6, 38 / Math.sqrt(n)) * zoom ** 0.4 + 1);
  const radius = Math.round(4 * size) / 4, gap = view.scale / Math.sqrt(Math.max(1, shown));  // pixels between images
  if (radius !== stamps.radius) makeStamps(radius);
  drawDots();
  pen.setTransform(ratio, 0, 0, ratio, 0, 0);
  drawn = [];
  if (pictures && gap > 16) drawPictures();
  drawMarks(radius + 2.5, gap > 16 || only.size);
  if (cursor >= 0) ring(cursor, radius + 5, colours.mark, 2);
  stroke(new Path2D(`M${path.join('L') || '0 0'}`), colours.pick, 1.5, [5, 4]);
}

/** Writes the marks into the pixels, several times as fast as the canvas draws them where there is no GPU. */
function drawDots() {
  const { half, back, dots, faint, rings } = stamps, out = new Uint32Array(image.data.buffer);
  const put = ({ places, pixels }, start) => {
    for (let i = 0; i < places.length; i++) {
      const over = pixels[i], a = over >>> 24, at = start + places[i], under = out[at];
      const mix = mask => ((under & mask) * (256 - a) + (over & mask) * a) / 256 & mask;
      out[at] = a === 255 ? over : 0xff000000 | mix(0xff00ff) | mix(0xff00);
    }
  };
  out.fill(back);
  for (const pass of [0, 1]) {
    for (const row of order) {
      const x = Math.round(sx(row) * ratio) - half, y = Math.round(sy(row) * ratio) - half;
      if (visible[row] !== pass || x < 0 || y < 0 || x + 2 * half > image.width || y + 2 * half > image.height) continue;
      const label = labelOf(row), shape = shapeOf(label), start = y * image.width + x;
      if (picked[row]) put(rings[shape], start);
      put((pass ? dots[colourOf(label)] : faint)[shape], start);
    }
  }
  pen.putImageData(image, 0, 0);
}

function drawPictures() {
  const least = Math.min(72, 28 * (view.scale / fitted) ** 0.3);  // pixels of their distance, which is less than twice this
  const level = 2 ** Math.floor(Math.log2(view.scale / least)), side = view.scale / level * 0.94;
  for (const row of spreadOut(1 / level)) {
    const tile = within(row, side) && findTile(row);
    if (!tile) continue;
    const [w, h] = sizeOf(row).map(length => length * side / Math.max(...sizeOf(row)));
    const box = [sx(row) - w / 2, sy(row) - h / 2, w, h];
    pen.fillStyle = picked[row] ? colours.pick : labels ? colours.classes[colourOf(labels[row])] : colours.soft;
    const edge = picked[row] ? 3.5 : 2;
    pen.fillRect(box[0] - edge, box[1] - edge, w + 2 * edge, h + 2 * edge);
    pen.drawImage(...tile, ...box);
    drawn.push([row, ...box]);
  }
}

function stroke(shape, colour, thickness, dash = []) {
  pen.setLineDash(dash);
  for (const [style, width] of [[colours.map, thickness + 2], [colour, thickness]]) {  // seen on thumbnails, too
    Object.assign(pen, { strokeStyle: style, lineWidth: width });
    pen.stroke(shape);
  }
}

function ring(row, radius, colour, thickness) {
  if (!within(row, radius)) return;
  const circle = new Path2D();
  circle.arc(sx(row), sy(row), radius, 0, 7);
  stroke(circle, colour, thickness);
}

/** Copies have a square around them, outliers a circle, doubtful labels a question mark; lines lead to the nearest. */
function drawMarks(r, close) {
  const squares = new Path2D(), marks = {
    copies: row => squares.rect(sx(row) - r, sy(row) - r, 2 * r, 2 * r), outliers: row => ring(row, r + 1.5, colours.mark, 1.25),
    doubts: row => { pen.strokeText('?', sx(row) + r, sy(row) - r + 4); pen.fillText('?', sx(row) + r, sy(row) - r + 4); } };
  Object.assign(pen, { fillStyle: colours.mark, font: '600 12px system-ui', strokeStyle: colours.map, lineWidth: 3 });
  for (const [kind, texts] of notes) {
    if (!close && texts.size > 100) continue;  // they would cover the map
    for (const row of texts.keys()) if (visible[row] && within(row, r)) marks[kind](row);
  }
  stroke(squares, colours.mark, 1.25);
  if (current < 0) return;
  const lines = new Path2D();
  for (const [row] of found) {
    lines.moveTo(sx(current), sy(current));
    lines.lineTo(sx(row), sy(row));
    ring(row, r, colours.mark, row === current ? 3 : 1);
  }
  stroke(lines, colours.mark, 0.75);
}

// ---- Moving ----

const extents = [0, 1].map(axis => Math.max(  // how much of the unit square the maps need
  0.1, ...maps.map(map => rows.reduce((most, row) => Math.max(most, 2 * Math.abs(map[2 * row + axis] - 0.5)), 0))));

function resize() {
  const box = canvas.getBoundingClientRect(), before = fitted;
  if (!box.width || matchMedia('print').matches) return;
  [width, height, ratio] = [box.width, box.height, devicePixelRatio];
  [canvas.width, canvas.height] = [Math.round(width * ratio), Math.round(height * ratio)];
  image = pen.createImageData(canvas.width, canvas.height);
  fitted = Math.max(50, Math.min((width - 60) / extents[0], (height - 110) / extents[1]));
  view.scale = before ? view.scale * fitted / before : fitted;
  readColours();
}

function zoomAt(factor, x = width / 2, y = height / 2) {
  const scale = Math.min(fitted * 400, Math.max(fitted / 2, view.scale * factor));
  view.x += (x - width / 2) * (1 / view.scale - 1 / scale);
  view.y += (y - height / 2) * (1 / view.scale - 1 / scale);
  view.scale = scale;
  hideCard();
}

function pan(dx, dy) {
  view.x -= dx / view.scale;
  view.y -= dy / view.scale;
  hideCard();
}

/** Calls `step` with numbers that rise to 1, or with 1 alone if the user prefers less motion. */
function glide(step) {
  const start = performance.now(), still = matchMedia('(prefers-reduced-motion: reduce)').matches;
  const next = now => {
    const t = still ? 1 : Math.min(1, Math.max(0, now - start) / 400);
    step(t * t * (3 - 2 * t));
    draw();
    if (t < 1) requestAnimationFrame(next);
  };
  next(start);
}

function moveTo(x, y, scale = view.scale) {
  const from = { ...view };
  glide(t => Object.assign(view, {
    x: from.x + (x - from.x) * t, y: from.y + (y - from.y) * t, scale: from.scale * (scale / from.scale) ** t }));
}

function changeMap(number) {
  const from = xy.slice();
  hideCard();
  glide(t => {
    xy = from.map((value, i) => value + (maps[number][i] - value) * t);
    spread.clear();
  });
}

/** Returns the image at a point of the canvas, or -1: a thumbnail, or else the nearest mark. */
function findAt(x, y) {
  const covers = ([, left, top, w, h]) => x >= left && y >= top && x < left + w && y < top + h;
  const [picture] = drawn.findLast(covers) ?? [-1];
  let best = picture, least = picture < 0 ? (stamps.radius + 8) ** 2 : 0;
  for (const row of rows) {
    const distance = (sx(row) - x) ** 2 + (sy(row) - y) ** 2;
    if (distance < least && visible[row]) [best, least] = [row, distance];
  }
  return best;
}

/** Moves the cursor to the nearest visible image on one side: within 45 degrees of the direction. */
function step(dx, dy) {
  const x = cursor < 0 ? width / 2 : sx(cursor), y = cursor < 0 ? height / 2 : sy(cursor);
  let best = -1, least = Infinity;
  for (const row of rows) {
    const right = sx(row) - x, down = sy(row) - y, along = right * dx + down * dy;
    const beside = Math.abs(right * dy) + Math.abs(down * dx), distance = along + 2 * beside;
    const there = visible[row] && (cursor < 0 || along > 0 && beside <= along);
    if (there && Math.abs(distance) < least) [best, least] = [row, Math.abs(distance)];
  }
  if (best >= 0) point(best);
}

/** Moves the cursor by a number of files. */
function leaf(by) {
  let row = cursor < 0 ? (by > 0 ? -1 : n) : cursor;
  do row += by; while (row >= 0 && row < n && !visible[row]);
  if (row >= 0 && row < n) point(row);
}

// ---- The card, the current image, the list ----

/** Moves the cursor to an image as keys do: into view, and spoken. */
function point(row) {
  const far = Math.abs(sx(row) - width / 2) > width / 2 - 40 || Math.abs(sy(row) - height / 2) > height / 2 - 50;
  if (far) Object.assign(view, { x: xy[2 * row], y: xy[2 * row + 1] });
  showCard(row);
  say(`${names[row]}, ${describe(row)}`);
}

function showCard(row) {
  cursor = row;
  const card = $('card'), [thumbnail, name, text] = card.children, x = sx(row), y = sy(row);
  const similarity = current >= 0 && found.find(([other]) => other === row);
  name.textContent = names[row];
  text.textContent = describe(row) + (similarity ? ` · similarity ${similarity[1].toFixed(3)}` : '');
  drawTile(thumbnail, row, Math.min(224, Math.max(128, tiles ? tiles.side * 2 : 0)));
  const right = x > width / 2, low = y > height / 2, away = length => `${Math.max(4, length + 14)}px`;
  Object.assign(card.style, {
    left: right ? '' : away(x), right: right ? away(width - x) : '',
    top: low ? '' : away(y), bottom: low ? away(height - y) : '' });
  card.hidden = false;
  redraw();
}

function hideCard() {
  cursor = -1;
  $('card').hidden = true;
  redraw();
}

/** Lists the images nearest to one by the network's features, from the exact search; the image itself comes first. */
function setCurrent(row) {
  current = row;
  const values = Array.from(cosines.subarray(row * k, (row + 1) * k), value => value / 65535 * 2 - 1);
  listImages(`Nearest to ${names[row]}`, [[row, 1], ...values.map((value, i) => [near[row * k + i], value])], row);
  if (!within(row, -20)) moveTo(xy[2 * row], xy[2 * row + 1]);
}

function listImages(title, list, row = -1) {
  [found, current] = [list, row];
  $('found-title').textContent = title;
  $('found-title').hidden = $('found-tools').hidden = !title;
  $('hint').hidden = Boolean(title);
  $('found').replaceChildren(...list.slice(0, 100).map(([row, value]) => {
    const item = $('hit').content.cloneNode(true);
    const [button, thumbnail, name, text] = item.querySelectorAll('button, canvas, bdi, span');
    button.title = `${names[row]}\n${describe(row)}`;
    button.dataset.row = row;
    name.textContent = names[row].split('/').pop();
    text.textContent = value?.toFixed(3) ?? '';
    drawTile(thumbnail, row, 148);
    return item;
  }));
  if (list.length > 100) $('found').append(`and ${counted(list.length - 100, 'more image')}`);
  if (title) say(title);
  pick([]);
}

function search(text) {
  const wanted = text.trim().toLowerCase();
  const hits = rows.filter(row => wanted && names[row].toLowerCase().includes(wanted));
  listImages(wanted && `${counted(hits.length, 'name')} with “${text.trim()}”`, hits.map(row => [row, null]));
}

// ---- Classes and findings ----

const hidden = new Set(), only = new Set();  // classes that are not shown; kinds of findings that alone are shown

function filter() {
  for (const row of rows) {
    visible[row] = !hidden.has(labelOf(row)) && (!only.size || [...only].some(kind => notes.get(kind).has(row)));
  }
  shown = visible.reduce((sum, one) => sum + one, 0);
  spread.clear();
  hideCard();
  say(`${counted(shown, 'image')} shown`);
}

/** Adds a switch with a mark to a list; `set` holds the keys that are switched on, or with `inverse` off. */
function addSwitch(list, [key, name, number], shape, colour, set, inverse) {
  const item = $('switch').content.cloneNode(true), box = item.querySelector('input');
  item.querySelector('path').setAttribute('d', shape);
  item.querySelector('svg').style.fill = colour;
  item.querySelector('bdi').textContent = name;
  item.querySelector('.number').textContent = number.toLocaleString('en');
  item.querySelector('button').setAttribute('aria-label', `Show only ${name}`);
  item.querySelector('button').onclick = () => showClasses(other => other === box);
  Object.assign(box, { checked: inverse, onchange: () => {
    if (box.checked === inverse) set.delete(key); else set.add(key);
    filter();
  } });
  list.append(item);
}

function showClasses(test) {
  for (const box of $('classes').querySelectorAll('input')) if (box.checked !== test(box)) box.click();
}

function listSwitches() {
  const counts = new Array(data.classes.length).fill(0);
  for (const label of labels ?? []) counts[label]++;
  data.classes.forEach((name, i) => counts[i] && addSwitch(
    $('classes'), [i, name, counts[i]], SHAPES[shapeOf(i)], `var(--c${colourOf(i)})`, hidden, true));
  for (const { key, name, mark, rows: found } of data.findings) {
    addSwitch($('findings'), [key, name, found.length], mark, '', only, false);
  }
}

// ---- Selection ----

function pick(which, value = 1) {
  for (const row of which) picked[row] = value;
  const total = pickedRows().length;
  $('count').textContent = total ? `${counted(total, 'image')} selected` : 'No image is selected';
  $('choose').textContent = current < 0 ? 'Select these' : picked[current] ? 'Remove from selection' : 'Select';
  for (const button of $('found').querySelectorAll('button')) {
    button.className = (picked[button.dataset.row] ? 'picked ' : '') + (button.dataset.row === String(current) ? 'self' : '');
  }
  if (which.length) say($('count').textContent);
  redraw();
}
const pickedRows = () => rows.filter(row => picked[row]);
const toggle = row => pick([row], 1 - picked[row]);

function pickInside(points, value) {
  const crosses = (x, y) => points.filter(([ax, ay], i) => {
    const [bx, by] = points[(i + 1) % points.length];
    return ay > y !== by > y && x < (bx - ax) * (y - ay) / (by - ay) + ax;
  }).length;
  pick(rows.filter(row => visible[row] && crosses(sx(row), sy(row)) % 2), value);
}

/** Returns the selection as a CSV file, which `simsiam pretrain` reads. */
function writeList() {
  const folder = $('prefix').value.trim().replace(/\/*$/, '/').replace(/^\/$/, '');
  const cell = text => /^\s|\s$|[",\n\r]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text;
  const lines = pickedRows().map(row => [folder + data.names[row], ...labels ? [data.cells[labels[row]]] : []]);
  return [labels ? ['path', 'label'] : ['path'], ...lines].map(line => line.map(cell).join(',') + '\n').join('');
}

function save() {
  // Python reads bytes that are no text as lone surrogates; here they become these bytes again.
  const parts = writeList().split(/([\udc80-\udcff])/u);
  const list = new Blob(parts.map((part, i) => i % 2 ? Uint8Array.of(part.charCodeAt(0)) : part));
  const link = make('a', { href: URL.createObjectURL(list), download: 'selection.csv' });
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10_000);
  say(`${$('count').textContent}, saved as selection.csv`);
}

const copy = () => navigator.clipboard.writeText(writeList()).then(
  () => say(`${$('count').textContent}, copied`), () => say('This browser lets no page copy; save the list instead'));

// ---- What the user does ----

const clicks = {
  'zoom-in': () => zoomAt(1.6), 'zoom-out': () => zoomAt(1 / 1.6), fit: () => moveTo(0.5, 0.5, fitted),
  lasso: () => { lassoing = press('lasso', !lassoing); canvas.classList.toggle('lasso', lassoing); },
  pictures: () => { pictures = press('pictures', !pictures); redraw(); },
  all: () => showClasses(() => true), none: () => showClasses(() => false),
  choose: () => current < 0 ? pick(found.map(([row]) => row)) : toggle(current),
  close: () => { $('find').value = ''; listImages('', []); },
  'select-shown': () => pick(rows.filter(row => visible[row])),
  'select-view': () => pick(rows.filter(row => visible[row] && within(row, 0))),
  list: () => listImages($('count').textContent, pickedRows().map(row => [row, null])),
  clear: () => pick(pickedRows(), 0), save, copy };
for (const [id, act] of Object.entries(clicks)) $(id).onclick = act;

function press(id, on) {
  $(id).setAttribute('aria-pressed', on);
  return on;
}

const keys = {
  '+': () => zoomAt(1.6), '=': () => zoomAt(1.6), '-': () => zoomAt(1 / 1.6), 0: clicks.fit,
  PageDown: () => leaf(1), PageUp: () => leaf(-1), Escape: () => { clicks.close(); hideCard(); },
  Enter: () => cursor >= 0 && setCurrent(cursor), ' ': () => cursor >= 0 && toggle(cursor) };
for (const [key, dx, dy] of [['Left', -1, 0], ['Right', 1, 0], ['Up', 0, -1], ['Down', 0, 1]]) {
  keys[`Arrow${key}`] = shift => shift ? pan(-80 * dx, -80 * dy) : step(dx, dy);
}
canvas.onkeydown = event => {
  if (!keys[event.key] || event.ctrlKey || event.metaKey || event.altKey) return;
  event.preventDefault();
  keys[event.key](event.shiftKey);
};

const pointers = new Map();  // of fingers, or the mouse while a button is down
let travelled = 0;
canvas.onpointerdown = event => {
  if (event.button) return;
  canvas.setPointerCapture(event.pointerId);
  pointers.set(event.pointerId, [event.offsetX, event.offsetY]);
  travelled = 0;
  path = pointers.size === 1 && (lassoing || event.shiftKey) ? [[event.offsetX, event.offsetY]] : [];
};
canvas.onpointermove = event => {
  const x = event.offsetX, y = event.offsetY, last = pointers.get(event.pointerId);
  if (!last) {
    const row = event.pointerType === 'mouse' ? findAt(x, y) : -1;
    canvas.classList.toggle('over', row >= 0);
    if (row !== cursor) { if (row < 0) hideCard(); else showCard(row); }
    return;
  }
  travelled += Math.hypot(x - last[0], y - last[1]);
  const other = [...pointers].find(([id]) => id !== event.pointerId)?.[1];  // pinching zooms around the other finger
  if (path.length) path.push([x, y]);
  else if (other) zoomAt(Math.hypot(x - other[0], y - other[1]) / Math.hypot(last[0] - other[0], last[1] - other[1]), ...other);
  else if (travelled > 4) pan(x - last[0], y - last[1]);
  pointers.set(event.pointerId, [x, y]);
  redraw();
};
canvas.onpointerup = event => {
  if (!pointers.delete(event.pointerId)) return;
  const points = path, row = findAt(event.offsetX, event.offsetY);
  path = [];
  if (points.length > 2 && travelled > 4) return pickInside(points, event.altKey ? 0 : 1);
  if (travelled > 4 || pointers.size) return redraw();
  if (row < 0) return clicks.close();
  if (event.ctrlKey || event.metaKey) return toggle(row);
  setCurrent(row);
  showCard(row);
};
canvas.onpointercancel = event => { pointers.delete(event.pointerId); path = []; };
canvas.onpointerleave = () => { if (!pointers.size) hideCard(); };
canvas.onwheel = event => {
  event.preventDefault();
  zoomAt(Math.exp(-event.deltaY * (event.deltaMode ? 0.05 : 0.002)), event.offsetX, event.offsetY);
};

const rowOf = event => Number(event.target.closest('button')?.dataset.row ?? -1);
$('found').onclick = event => { if (rowOf(event) >= 0) setCurrent(rowOf(event)); };
for (const kind of ['mouseover', 'focusin']) {
  $('found').addEventListener(kind, event => rowOf(event) >= 0 && within(rowOf(event), 0) && showCard(rowOf(event)));
}
$('find').oninput = () => search($('find').value);
$('projection').onchange = () => changeMap($('projection').selectedIndex);

// ---- The start ----

$('projection').append(...data.maps.map(map => make('option', { textContent: map.name })));
$('projection-label').hidden = maps.length < 2;
$('pictures').hidden = !tiles;
$('classes-section').hidden = !labels;
listSwitches();
pick([]);
resize();
new ResizeObserver(resize).observe(canvas);
for (const media of ['print', '(prefers-color-scheme: dark)']) matchMedia(media).onchange = readColours;
