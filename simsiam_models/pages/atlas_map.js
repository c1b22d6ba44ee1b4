'use strict';
// The map of an atlas: images as marks and thumbnails on a canvas. All data stand in the page.

const $ = id => document.getElementById(id);
const data = JSON.parse($('data').textContent);
const { labels, tiles, k } = data, n = data.names.length;
const bytes = text => Uint8Array.from(atob(text), c => c.charCodeAt(0));
const decode = (text, Kind) => new Kind(bytes(text).buffer);
const near = decode(data.near, Uint32Array), cosines = decode(data.cosines, Uint16Array);
const maps = data.maps.map(map => decode(map.xy, Float32Array));  // x, y of each image, in 0 .. 1
const place = tiles && decode(tiles.place, Uint32Array), sizes = tiles && decode(tiles.sizes, Uint8Array);
const notes = new Map(data.findings.map(finding => [finding.key, new Map(finding.rows)]));  // kind -> row -> text
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
// Sheets in 400 MB, which is all unless --thumbnail asked for larger tiles.
const KEPT = tiles ? Math.max(8, Math.floor(400e6 / (4 * PLACES * tiles.side ** 2))) : 0;
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
    const all = new Uint32Array(to.getImageData(0, 0, side, side).data.buffer);
    const used = [...all.keys()].filter(i => all[i]);
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
  drawMarks(radius + 2.5, gap > 40 || shown < n);
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
      const outside = x < 0 || y < 0 || x > image.width - 2 * half || y > image.height - 2 * half;
      if (outside || visible[row] !== pass) continue;
      const label = labelOf(row), shape = shapeOf(label), start = y * image.width + x;
      if (picked[row]) put(rings[shape], start);
      put((pass ? dots[colourOf(label)] : faint)[shape], start);
    }
  }
  pen.putImageData(image, 0, 0);
}

function drawPictures() {
  const least = Math.min(72, 28 * (view.scale / fitted) ** 0.3);  // pixels: their distance is this, to twice this
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
  const squares = new Path2D();
  const marks = {
    copies: row => squares.rect(sx(row) - r, sy(row) - r, 2 * r, 2 * r),
    outliers: row => ring(row, r + 1.5, colours.mark, 1.25),
    doubts: row => {
      [pen.fillStyle, pen.strokeStyle, pen.lineWidth, pen.font] = [colours.mark, colours.map, 3, '600 12px system-ui'];
      pen.strokeText('?', sx(row) + r, sy(row) - r + 4);
      pen.fillText('?', sx(row) + r, sy(row) - r + 4);
    } };
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
