"use strict";
// Everything that comes from the image is set as text, never as markup.
const data = JSON.parse(document.getElementById("data").textContent);
const $ = (id) => document.getElementById(id);
const make = (tag, props = {}, ...children) => {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(props)) name === "style" ? node.setAttribute("style", value) : (node[name] = value);
  node.append(...children);
  return node;
};
const svg = (tag, attributes, text) => {
  const node = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  if (text !== undefined) node.textContent = text;
  return node;
};
const size = (bytes) => {
  const units = ["B", "KiB", "MiB", "GiB", "TiB"];
  let unit = 0;
  while (bytes >= 1023.95 && unit < 4) { bytes /= 1024; unit += 1; }
  return (unit ? bytes.toFixed(1) : Math.round(bytes)) + " " + units[unit];
};
const time = (seconds) => seconds >= 10 ? seconds.toFixed(1) + " s" : seconds >= 1 ? seconds.toFixed(2) + " s"
  : seconds >= 0.01 ? (seconds * 1e3).toFixed(0) + " ms" : (seconds * 1e3).toFixed(2) + " ms";
const count = (number) => number.toLocaleString("en").replaceAll(",", " ");
const path = (file) => file === null || file === undefined ? "file system metadata" : data.files[file];

const start = data.start;
const end = Math.max(start.seconds, 1e-3);
const PARTS = [["queue", "queue", "waiting for a request"], ["network", "network", "request to last byte"], ["line-up", "line_up", "waiting for a processor"],
  ["decompress", "decompress", "decompress"], ["verify", "verify", "verify"], ["other", "other", "hand over"]];

function legend(id, entries) {
  for (const [colour, text] of entries) $(id).append(make("span", {}, make("i", { style: `background: var(--${colour})` }), text));
}

function head() {
  document.title = `${data.id}: the start explained`;
  $("title").textContent = data.image;
  $("sub").textContent = `${data.id} · ${data.device} (${data.transport}) · ${data.digest} · ${size(data.device_bytes)}, ${data.file_system || "no file system"}`
    + (start.read_ahead_kb === null ? "" : ` · read-ahead ${start.read_ahead_kb} KiB`);
  const cards = [
    [time(start.seconds), start.ready ? "until the program was ready" : "recorded; nobody said that the program is ready", true],
    [start.floor > 0 ? (start.seconds / start.floor).toFixed(2) + " ×" : "–", `the limit of ${time(start.floor)}: ${start.bound}`],
    [time(start.waited), `in which a read waited (${Math.round(100 * start.waited / end)}%), ${count(start.waits)} waits`],
    [size(start.fetched_bytes), `fetched in ${count(start.requests)} requests`],
    [size(start.read_bytes), "read for the first time, 4 KiB blocks"],
    [start.link > 0 ? (start.link * 8 / 1e6).toFixed(start.link > 1.25e7 ? 0 : 1) + " Mbit/s" : "–", "came over the link while it was busy"],
  ];
  if (start.pack_bytes > 0) {
    cards.push([size(start.pack_bytes), "start-up pack as stored" + (start.laid_bytes > 0
      ? `; ${size(start.laid_bytes)} of it laid into the page cache as it came`
      : `; of its plain bytes ${size(start.vain_bytes)} were not read`)]);
    cards.push([count(start.missed), `chunks that were waited for outside the pack`]);
  }
  for (const [value, text, main] of cards) $("cards").append(make("div", { className: main ? "card main" : "card" }, make("b", { textContent: value }), make("span", { textContent: text })));
}

// --- what came and what was read, over time ---

function timeline() {
  const [width, height, left, right, top, bottom] = [1130, 220, 62, 16, 16, 26];
  const plot = svg("svg", { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": "bytes over time" });
  const x = (t) => left + Math.min(t / end, 1) * (width - left - right);
  const steps = (events) => {
    let sum = 0;
    return events.filter((event) => event[0] <= end).sort((a, b) => a[0] - b[0]).map(([t, bytes]) => [t, (sum += bytes)]);
  };
  const came = steps(data.fetches.map((fetch) => [fetch.arrived, fetch.stored]));
  const read = steps(data.touches.map((touch) => [touch[0], touch[2] * 4096]));
  const most = Math.max(1, ...came.slice(-1).map((step) => step[1]), ...read.slice(-1).map((step) => step[1]));
  const y = (bytes) => height - bottom - bytes / most * (height - top - bottom);
  // Bands in which somebody waited: joined, so that few are drawn.
  const bands = [];
  for (const wait of data.waits) {
    const last = bands[bands.length - 1];
    if (last && wait.asked <= last[1] + end / 2000) last[1] = Math.max(last[1], wait.done);
    else bands.push([wait.asked, wait.done]);
  }
  for (const [from, to] of bands) {
    if (from < end) plot.append(svg("rect", { x: x(from), y: top, width: Math.max(x(to) - x(from), 0.5), height: height - top - bottom, fill: "var(--wait)" }));
  }
  for (let line = 0; line <= 4; line++) {
    const at = y(most * line / 4);
    plot.append(svg("line", { class: "axis", x1: left, x2: width - right, y1: at, y2: at }));
    plot.append(svg("text", { x: left - 8, y: at + 4, "text-anchor": "end" }, size(most * line / 4)));
  }
  for (let line = 0; line <= 8; line++) plot.append(svg("text", { x: x(end * line / 8), y: height - 8, "text-anchor": line === 8 ? "end" : "middle" }, time(end * line / 8)));
  const draw = (events, colour) => {
    const every = Math.ceil(events.length / 2000);
    let d = `M${x(0)},${y(0)}`;
    events.forEach(([t, sum], number) => { if (number % every === 0 || number === events.length - 1) d += `H${x(t).toFixed(1)}V${y(sum).toFixed(1)}`; });
    plot.append(svg("path", { d: d + `H${x(end)}`, fill: "none", stroke: `var(--${colour})`, "stroke-width": 2 }));
  };
  draw(came, "network");
  draw(read, "read");
  if (start.floor > 0 && start.floor < end) {
    plot.append(svg("line", { class: "ready", x1: x(start.floor), x2: x(start.floor), y1: top, y2: height - bottom }));
    plot.append(svg("text", { x: x(start.floor) + 5, y: top + 10 }, "limit"));
  }
  $("timeline").append(plot);
  legend("timeline-legend", [["network", "arrived, compressed"], ["read", "read for the first time, plain"], ["wait", "a read waits"]]);
}

// --- the waterfall ---

const ROWS = 400;
function waterfall() {
  const inside = data.waits.filter((wait) => wait.asked <= end);
  const shown = inside.slice().sort((a, b) => (b.done - b.asked) - (a.done - a.asked)).slice(0, ROWS).sort((a, b) => a.asked - b.asked);
  legend("falls-legend", PARTS.map(([colour, , text]) => [colour, text]));
  $("falls-note").textContent = inside.length === 0 ? "No read waited." : shown.length < inside.length
    ? `The ${count(shown.length)} longest of ${count(inside.length)} waits, in the order of time.` : `All ${count(inside.length)} waits, in the order of time.`;
  if (data.forgotten > 0) $("falls-note").textContent += ` ${count(data.forgotten)} earlier ones were forgotten.`;
  const percent = (t) => 100 * t / end;
  const rows = document.createDocumentFragment();
  for (const wait of shown) {
    const bar = make("div", { className: "bar" });
    let at = wait.asked;
    for (const [colour, field] of PARTS) {
      const length = wait[field];
      if (length > 0) bar.append(make("i", { style: `left: ${percent(at)}%; width: ${percent(length)}%; background: var(--${colour})` }));
      at += length;
    }
    const parts = PARTS.filter(([, field]) => wait[field] > 0).map(([, field, text]) => `${text} ${time(wait[field])}`).join(", ");
    const about = `${path(wait.file)}\nchunk ${wait.chunk}, ${size(wait.len)} at ${count(wait.offset)}\nasked after ${time(wait.asked)}, waited ${time(wait.done - wait.asked)}: ${parts}`
      + (wait.by ? `\n${wait.by}` : "") + (wait.source ? `\n${wait.source}` : "");
    const name = make("div", { className: "path", title: about }, make("bdi", { textContent: path(wait.file) }));
    rows.append(name, make("div", { className: "num", textContent: time(wait.done - wait.asked) }), bar);
    bar.title = about;
  }
  $("falls").append(rows);
}

// --- files ---

function table(id, head, rows) {
  const body = make("tbody");
  for (const row of rows) body.append(make("tr", {}, ...row.map((cell, at) => make("td", { textContent: cell, className: at ? "" : "path" }))));
  $(id).replaceChildren(make("table", {}, make("thead", {}, make("tr", {}, ...head.map((text) => make("th", { textContent: text })))), body));
}

function files() {
  const show = () => {
    const wanted = $("filter").value.toLowerCase();
    const rows = data.by_file.filter((row) => path(row.file).toLowerCase().includes(wanted)).slice(0, 300);
    table("files", ["file", "read", "fetched", "waits", "waited"], rows.map((row) => [path(row.file), size(row.read), size(row.fetched), count(row.waits), time(row.waited)]));
  };
  $("filter").addEventListener("input", show);
  show();
  const list = (id, rows, none) => {
    if (rows.length) table(id, ["file", "bytes"], rows.slice(0, 100).map((row) => [path(row.file), size(row.bytes)]));
    else $(id).replaceWith(make("p", { textContent: none }));
  };
  $("pack").hidden = start.pack_bytes === 0;
  list("missed", data.missed, "Nothing: every block that was waited for is in the start-up pack.");
  if (start.laid_bytes > 0) {
    $("vain").replaceWith(make("p", { textContent: "It was laid into the page cache before the program asked, so that nobody saw what the program used of it: firstread record takes a start without that." }));
  } else {
    list("vain", data.vain, "Nothing: everything in the start-up pack was read.");
  }
}

// --- the device ---

function map() {
  const cells = data.map.cells, columns = 256, rows = Math.ceil(cells.length / columns), scale = 4;
  const canvas = make("canvas", { width: columns * scale, height: Math.max(rows, 1) * scale });
  const colours = () => {
    const style = getComputedStyle(document.documentElement);
    const colour = (name) => style.getPropertyValue("--" + name);
    const context = canvas.getContext("2d");
    context.clearRect(0, 0, canvas.width, canvas.height);
    // A letter a cell: what happened in it that says most.
    const names = { ".": "empty", d: "line", l: "local", h: "hot", v: "vain", r: "read", m: "missed" };
    for (let cell = 0; cell < cells.length; cell++) {
      context.fillStyle = colour(names[cells[cell]]);
      context.fillRect((cell % columns) * scale, Math.floor(cell / columns) * scale, scale - 1, scale - 1);
    }
  };
  colours();
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", colours);
  $("map").append(canvas);
  $("map-note").textContent = `Each cell is ${size(data.map.cell_bytes)} of the device; the first is the left one at the top.`;
  legend("map-legend", [["missed", "read, and waited for outside the pack"], ["read", start.laid_bytes > 0 ? "read, or laid into the page cache" : "read"], ["vain", "in the start-up pack, not read"], ["local", "local, not read"],
    ["line", "not local"], ["empty", "zeros"]]);
}

head();
timeline();
waterfall();
files();
map();
$("made").textContent = `firstread ${data.version}; seconds count from attach.`;
document.body.dataset.drawn = "yes";
