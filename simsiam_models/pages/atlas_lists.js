// The lists beside the map of an atlas, and what the user does; atlas_map.js, in the same scope, has the map.

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

/** Zooms around the image of the arrow keys, or else the one whose nearest are listed, if it is in view. */
function zoom(factor) {
  const row = [cursor, current].find(row => row >= 0 && within(row, 0)) ?? -1, held = cursor;
  if (row < 0) return zoomAt(factor);
  zoomAt(factor, sx(row), sy(row));
  if (held >= 0) showCard(held);
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
  listImages(wanted && `${counted(hits.length, 'file name')} containing “${text.trim()}”`, hits.map(row => [row, null]));
}

// ---- Classes and findings ----

const boxes = (list, state) => Array.from($(list).querySelectorAll(`input${state}`), box => box.value);

/** Shows the classes that are switched on, and of these, if findings are switched on, only the images found. */
function filter() {
  const hidden = new Set(boxes('classes', ':not(:checked)').map(Number)), only = boxes('findings', ':checked');
  for (const row of rows) {
    visible[row] = !hidden.has(labelOf(row)) && (!only.length || only.some(kind => notes.get(kind).has(row)));
  }
  shown = visible.reduce((sum, one) => sum + one, 0);
  spread.clear();
  hideCard();
  say(`${counted(shown, 'image')} shown`);
}

function addSwitch(list, name, number, box, shape, colour) {
  const item = $('switch').content.cloneNode(true), [own, button] = item.querySelectorAll('input, button');
  item.querySelector('path').setAttribute('d', shape);
  item.querySelector('svg').style.fill = colour;
  item.querySelector('bdi').textContent = name;
  item.querySelector('.number').textContent = number.toLocaleString('en');
  Object.assign(own, { ...box, onchange: filter });
  button.setAttribute('aria-label', `Show only ${name}`);
  button.onclick = () => showClasses(other => other === own);
  $(list).append(item);
}

function showClasses(test) {
  for (const box of $('classes').querySelectorAll('input')) box.checked = test(box);
  filter();
}

function listSwitches() {
  const counts = new Array(data.classes.length).fill(0);
  for (const label of labels ?? []) counts[label]++;
  data.classes.forEach((name, i) => counts[i] && addSwitch(
    'classes', name, counts[i], { value: i, checked: true }, SHAPES[shapeOf(i)], `var(--c${colourOf(i)})`));
  for (const { key, name, mark, rows } of data.findings) {
    addSwitch('findings', name, rows.length, { value: key }, mark, '');
  }
}

// ---- Selection ----

function pick(which, value = 1) {
  for (const row of which) picked[row] = value;
  const total = pickedRows().length;
  $('count').textContent = total ? `${counted(total, 'image')} selected` : 'No images selected';
  $('choose').textContent = current < 0 ? 'Select these' : picked[current] ? 'Remove from selection' : 'Select';
  for (const button of $('found').querySelectorAll('button')) {
    button.classList.toggle('picked', Boolean(picked[button.dataset.row]));
    button.classList.toggle('self', Number(button.dataset.row) === current);
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
  () => say(`${$('count').textContent}, copied`), () => say('This browser does not let the page copy; save the list as CSV instead'));

// ---- What the user does ----

const clicks = {
  'zoom-in': () => zoom(1.6), 'zoom-out': () => zoom(1 / 1.6), fit: () => moveTo(0.5, 0.5, fitted),
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
  '+': clicks['zoom-in'], '=': clicks['zoom-in'], '-': clicks['zoom-out'], 0: clicks.fit,
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
const distance = (a, b) => Math.hypot(a[0] - b[0], a[1] - b[1]);
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
  travelled += distance([x, y], last);
  const other = [...pointers].find(([id]) => id !== event.pointerId)?.[1];  // pinching zooms around the other finger
  if (path.length) path.push([x, y]);
  else if (other) zoomAt(distance([x, y], other) / distance(last, other), ...other);
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
