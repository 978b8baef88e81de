// What the browser does with the stream of events. Everything that came from outside becomes text (textContent), never
// markup; the content security policy forbids the rest.
"use strict";

const SPAN_S = 3600;
const STALE_MS = 8000;
const TIERS = [["ram", "RAM"], ["disk", "disk"], ["store", "store"]];
const byId = (id) => document.getElementById(id);

// Text

function bytes(count) {
  const units = ["B", "KiB", "MiB", "GiB", "TiB", "PiB"];
  let unit = 0;
  while (Math.abs(count) >= 1024 && unit < units.length - 1) { count /= 1024; unit += 1; }
  return `${count.toFixed(unit && count < 100 ? 1 : 0)} ${units[unit]}`;
}
const rate = (perS) => (perS == null ? "" : `${bytes(perS)}/s`);
const percent = (share) => `${(100 * share).toFixed(share < 0.1 ? 1 : 0)} %`;
const count = (number) => number.toLocaleString("en");

function duration(s) {
  if (s < 90) return `${Math.max(0, Math.round(s))} s`;
  if (s < 5400) return `${Math.round(s / 60)} min`;
  if (s < 172800) return `${(s / 3600).toFixed(1)} h`;
  return `${Math.round(s / 86400)} d`;
}
const hourAndMinute = (at) => new Date(1000 * at).toLocaleTimeString([], { hour: "2-digit", minute: "2-digit", hour12: false });
const clock = (at) => new Date(1000 * at).toLocaleTimeString([], { hour: "2-digit", minute: "2-digit", second: "2-digit", hour12: false });

// Elements. A name that came from outside is isolated, so that its direction of writing ends with it.

function element(kind, classes, ...children) {
  const made = document.createElement(kind);
  if (classes) made.className = classes;
  made.append(...children);
  return made;
}
const text = (value) => element("span", "", String(value));
const name = (value) => element("bdi", "name", String(value));
// On a narrow screen a row is a card, and a cell says what it is itself.
function cell(label, classes, ...children) {
  const made = element("td", classes, ...children);
  made.dataset.label = label;
  return made;
}
const number = (label, value) => cell(label, "number", value);

function rowHead(...children) {
  const made = element("th", "", ...children);
  made.scope = "row";
  return made;
}

function bar(parts, label) {
  const made = element("div", "bar");
  made.setAttribute("role", "img");
  made.setAttribute("aria-label", label);
  for (const [classes, share] of parts) {
    const part = element("i", classes);
    part.style.width = `${100 * Math.min(1, Math.max(0, share))}%`;
    made.append(part);
  }
  return made;
}

function fill(id, rows, leftOut, empty) {
  const body = byId(id);
  if (!rows.length) rows = [element("tr", "empty", wide(empty))];
  if (leftOut) rows.push(element("tr", "empty", wide(`and ${count(leftOut)} more`)));
  body.replaceChildren(...rows);
}
function wide(value) {
  const made = element("td", "", value);
  made.colSpan = 9;
  return made;
}

// Sections

function tile(label, value, detail) {
  return element("div", "", element("dt", "", label), element("dd", "", value, element("small", "", detail || "\u00a0")));
}

function showTiles(view) {
  const tiles = [];
  const rates = view.rates;
  if (rates) {
    const total = rates.ram + rates.disk + rates.store;
    const hit = total ? `${percent((rates.ram + rates.disk) / total)} from the cache` : "nothing is read";
    tiles.push(tile("Throughput", rate(total), hit), tile("From stores", rate(rates.fetched), "warming included"));
  }
  for (const tier of view.tiers) {
    const label = tier.name === "ram" ? "RAM" : "Disk";
    const pinned = tier.pinned_bytes ? `, ${bytes(tier.pinned_bytes)} pinned` : "";
    const state = tier.limit_bytes && !tier.is_writable ? ", not writable" : "";
    tiles.push(tile(label, bytes(tier.used_bytes), `of ${bytes(tier.limit_bytes)}${pinned}${state}`));
  }
  if (view.node) {
    const node = view.node;
    tiles.push(tile("Service", bytes(node.memory_bytes), `memory beside the arena; ${node.cpu_s.toFixed(0)} CPU s`));
  }
  byId("tiles").replaceChildren(...tiles);
}

function showNode(view) {
  const node = view.node;
  byId("host").textContent = node ? node.host : "";
  document.title = node ? `fastload ${node.host}` : "fastload";
  const parts = node
    ? [node.is_daemon ? "daemon" : "service on demand", `process ${node.pid}`, `up ${duration(view.at - node.started_at)}`, `fastload ${node.fastload}`, node.directory]
    : [];
  byId("node").replaceChildren(...parts.flatMap((part, index) => [index ? " · " : "", element("bdi", "", String(part))]));
}

function showTroubles(view) {
  byId("troubles-section").hidden = !view.troubles.length;
  const lines = view.troubles.map((trouble) => element("li", "", element("bdi", "", trouble)));
  byId("troubles").replaceChildren(...lines);
}

const CAUSES = ["work", "startup", "listing", "index", "fetch", "disk", "service", "decompress", "decode", "map", "collate", "transfer", "other"];
const causeClass = (cause) => `cause-${CAUSES.includes(cause) ? cause : "other"}`;

function showRanks(view) {
  const seen = new Set();
  const rows = view.ranks.map((rank) => {
    const label = rank.rank == null ? rank.name || "consumer" : `rank ${rank.rank}`;
    const head = rowHead(name(label));
    if (rank.is_slowest) head.append(element("span", "slowest", "\u25c0 slowest"));
    const program = cell("Program", "", element("bdi", "name", `${rank.program || rank.name} (${rank.pid})`));
    const time = cell("", "");
    if (rank.work == null) time.append(element("span", "empty", "reports nothing"));
    else {
      const waits = Object.entries(rank.waits).sort((one, other) => other[1] - one[1]);
      const parts = [["work", rank.work], ...waits];
      const words = parts.filter(([, share], index) => index === 0 || share >= 0.005).slice(0, 4)
        .map(([cause, share]) => `${cause} ${percent(share)}`).join(", ");
      parts.forEach(([cause]) => seen.add(cause));
      time.append(bar(parts.map(([cause, share]) => [causeClass(cause), share]), words), element("bdi", "quiet", words));
    }
    if (rank.verdict) time.append(element("bdi", "name", rank.verdict));
    const samples = rank.samples_per_s == null ? "" : count(Math.round(rank.samples_per_s));
    return element("tr", "", head, program, number("Bytes/s", rate(rank.bytes_per_s)), number("Samples/s", samples), time);
  });
  fill("ranks", rows, view.left_out.ranks, "nothing reads");
  const legend = CAUSES.filter((cause) => seen.has(cause))
    .map((cause) => element("li", "", element("i", `swatch ${causeClass(cause)}`), cause === "work" ? "own work" : cause));
  byId("causes").replaceChildren(...legend);
}

function showJobs(view) {
  const rows = view.jobs.map((job) => {
    const head = rowHead(name(job.name || job.id));
    if (job.name && job.name !== job.id) head.append(element("bdi", "quiet", job.id));
    const state = cell("State", job.error ? "error" : "", text(job.state));
    if (job.failed_shards) state.append(element("div", "error", `${count(job.failed_shards)} of ${count(job.shard_count)} shards are missing`));
    if (job.error) state.append(name(job.error));
    const share = job.total_bytes ? job.held_bytes / job.total_bytes : 0;
    const words = `${percent(share)} of ${bytes(job.total_bytes)}`;
    const held = cell("", "");
    if (job.total_bytes) held.append(bar([["disk", share]], words), element("span", "quiet", words));
    const left = job.eta_s >= 0 && job.state !== "done" ? duration(job.eta_s) : "";
    const isLate = job.deadline_at && job.eta_s >= 0 && view.at + job.eta_s > job.deadline_at;
    const deadline = job.deadline_at ? clock(job.deadline_at) + (isLate ? " (late)" : "") : "";
    const perS = job.bytes_per_s ? rate(job.bytes_per_s) : "";
    return element("tr", "", head, state, held, number("Rate", perS), number("Left", left), cell("Deadline", isLate ? "error" : "", deadline));
  });
  fill("jobs", rows, view.left_out.jobs, "none");
}

function showData(view) {
  const rows = view.data_sets.map((data) => {
    const whole = Math.max(data.byte_count, data.ram_bytes, data.disk_bytes, 1);
    // What is in RAM is mostly on disk, too.
    const onlyDisk = Math.max(0, data.disk_bytes - data.ram_bytes);
    const words = `${bytes(data.ram_bytes)} in RAM, ${bytes(data.disk_bytes)} on disk`;
    const held = cell("", "", bar([["ram", data.ram_bytes / whole], ["disk", onlyDisk / whole]], words), element("span", "quiet", words));
    const used = data.last_use_at ? `${duration(view.at - data.last_use_at)} ago` : "";
    const pinned = data.pinned_bytes ? bytes(data.pinned_bytes) : "";
    return element("tr", "", rowHead(name(data.name)), held, number("Size", bytes(data.byte_count)), number("Objects", count(data.object_count)), number("Pinned", pinned), cell("Used", "", used));
  });
  fill("data", rows, view.left_out.data_sets, "nothing");
}

function showEndpoints(view) {
  const rows = view.endpoints.map((endpoint) => element(
    "tr", "",
    rowHead(name(endpoint.name || "(the provider's own)")),
    number("In flight", `${endpoint.requests_in_flight} of ${endpoint.requests_allowed}`),
    number("Goodput", endpoint.bytes_per_s ? rate(endpoint.bytes_per_s) : ""),
    number("First byte", endpoint.first_byte_s >= 0 ? `${(1000 * endpoint.first_byte_s).toFixed(0)} ms` : ""),
    number("Requests", count(endpoint.requests)),
    number("Refused", count(endpoint.throttled_requests + endpoint.timed_out_requests)),
    cell("Throttled at", "", endpoint.throttled_at ? `${endpoint.throttled_at} requests` : "never"),
  ));
  fill("endpoints", rows, view.left_out.endpoints, "none was asked yet");
}

// Plots

const points = { at: [], ram: [], disk: [], store: [], fetched: [] };
let plots = [];

function takePoints(more) {
  for (const key of Object.keys(points)) points[key].push(...more[key]);
  const first = points.at.findIndex((at) => at > points.at.at(-1) - SPAN_S);
  if (first > 0) for (const key of Object.keys(points)) points[key].splice(0, first);
}

function replacePoints(more) {
  for (const key of Object.keys(points)) points[key] = [];
  takePoints(more);
}

// Of each point the shares in the half minute up to it: of RAM, of RAM and disk, and of all, as areas on top of each other.
const SHARES_OVER = 6;
const read = { ram: [], disk: [], store: [] };

function takeShares() {
  for (const [key] of TIERS) {
    read[key] = points[key].map((now, index) => {
      if (now == null) return null;
      const lately = points[key].slice(Math.max(0, index + 1 - SHARES_OVER), index + 1);
      const total = TIERS.reduce((sum, [each]) => sum + points[each].slice(Math.max(0, index + 1 - SHARES_OVER), index + 1)
        .reduce((part, rate) => part + (rate ?? 0), 0), 0);
      return total ? lately.reduce((part, rate) => part + (rate ?? 0), 0) / total : null;
    });
  }
}
const stacked = (...keys) => read.ram.map((share, index) => (share == null ? null : 100 * keys.reduce((sum, key) => sum + read[key][index], 0)));

const POWERS = Array.from({ length: 50 }, (_, power) => 2 ** power);
const colour = (variable) => getComputedStyle(document.documentElement).getPropertyValue(variable).trim();

function plot(id, series, options) {
  const place = byId(id);
  const axis = { stroke: colour("--quiet"), grid: { stroke: colour("--line"), width: 1 }, ticks: { stroke: colour("--line"), width: 1 } };
  const made = new uPlot({
    width: Math.max(280, place.clientWidth), height: 220,
    cursor: { y: false, drag: { setScale: false } },
    scales: { x: { range: (_, low, high) => [Math.min(low, high - 300), high] }, y: options.scale },
    axes: [
      { ...axis, incrs: [60, 300, 600, 900, 1800], values: (_, values) => values.map(hourAndMinute) },
      { ...axis, size: 76, incrs: options.steps, values: (_, values) => values.map(options.tick) },
    ],
    series: [{ value: (_, at) => (at == null ? "" : clock(at)) }, ...series],
  }, [[], ...series.map(() => [])], place);
  const move = (event) => {
    const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    const at = made.data[0];
    if (!step || !at.length) return;
    event.preventDefault();
    const index = Math.min(at.length - 1, Math.max(0, (made.cursor.idx ?? at.length - 1) + step));
    made.setCursor({ left: made.valToPos(at[index], "x"), top: 0 });
    byId("spoken").textContent = `${clock(at[index])}: ${options.words(index)}`;
  };
  place.addEventListener("keydown", move);
  return { made, place, remove: () => { place.removeEventListener("keydown", move); made.destroy(); } };
}

function line(label, variable, value, fillShare) {
  const stroke = colour(variable);
  return { label, stroke, width: 2, spanGaps: false, points: { show: false }, value: (_, shown, series, index) => value(shown, index ?? null), fill: fillShare ? stroke : undefined };
}

const throughputWords = (index) => TIERS.map(([key, label]) => `${label} ${rate(points[key][index] ?? 0)}`).join(", ");
const sharesWords = (index) => (read.ram[index] == null
  ? "nothing was read"
  : TIERS.map(([key, label]) => `${label} ${percent(read[key][index])}`).join(", "));
const shareOf = (key) => (_, index) => (index == null || read[key][index] == null ? "" : percent(read[key][index]));

function drawPlots() {
  plots.forEach((each) => each.remove());
  const shown = (value) => (value == null ? "" : rate(value));
  plots = [
    plot("throughput", [
      ...TIERS.map(([key, label]) => line(label, `--${key}`, shown)),
      { ...line("fetched", "--fetched", shown), dash: [5, 5], width: 1.5 },
    ], { scale: { range: (_, __, high) => [0, Math.max(1, high || 0) * 1.05] }, tick: (value) => rate(value), steps: POWERS, words: throughputWords }),
    // The largest area is drawn first.
    plot("shares", [
      line("store", "--store", shareOf("store"), true), line("disk", "--disk", shareOf("disk"), true), line("RAM", "--ram", shareOf("ram"), true),
    ], { scale: { range: () => [0, 100] }, tick: (value) => `${value} %`, steps: [20, 50], words: sharesWords }),
  ];
  showPoints();
}

function showPoints() {
  if (!plots.length) return;
  takeShares();
  plots[0].made.setData([points.at, points.ram, points.disk, points.store, points.fetched]);
  plots[1].made.setData([points.at, stacked("ram", "disk", "store"), stacked("ram", "disk"), stacked("ram")]);
  const last = points.at.length - 1;
  byId("throughput-text").textContent = last < 0 ? "figures come in a few seconds" : `At ${clock(points.at[last])}: ${throughputWords(last)}.`;
  byId("shares-text").textContent = last < 0 ? "" : `At ${clock(points.at[last])}: ${sharesWords(last)}.`;
}

// The stream

let isPaused = false;
let latest = null;
let heardAt = 0;

function say(words, classes) {
  const state = byId("state");
  if (state.textContent !== words) state.textContent = words;
  state.className = classes;
  document.body.classList.toggle("stale", classes !== "live");
}

function show(view) {
  latest = view;
  if (view.why) {
    say(view.why, "bad");
    return;
  }
  say(isPaused ? "paused" : "live", isPaused ? "" : "live");
  if (isPaused) return;
  showNode(view);
  showTroubles(view);
  showTiles(view);
  showRanks(view);
  showJobs(view);
  showData(view);
  showEndpoints(view);
}

function connect() {
  const source = new EventSource("events");
  let isFirst = true;
  source.addEventListener("points", (event) => {
    const more = JSON.parse(event.data);
    if (isFirst) replacePoints(more);
    else takePoints(more);
    isFirst = false;
    if (!isPaused) showPoints();
  });
  source.addEventListener("view", (event) => {
    heardAt = Date.now();
    show(JSON.parse(event.data));
  });
  source.addEventListener("open", () => { isFirst = true; });
  source.addEventListener("error", () => {
    say("the page's process does not answer; it may be busy with 16 browsers, or run `fastload status --open` again", "bad");
    if (source.readyState === EventSource.CLOSED) setTimeout(connect, 10000);
  });
}

byId("pause").addEventListener("click", () => {
  isPaused = !isPaused;
  byId("pause").setAttribute("aria-pressed", String(isPaused));
  if (latest) show(latest);
  if (!isPaused) showPoints();
});
setInterval(() => {
  if (heardAt && Date.now() - heardAt > STALE_MS) say("nothing came for some seconds", "bad");
}, 2000);
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", drawPlots);
new ResizeObserver(() => plots.forEach(({ made, place }) => {
  const width = Math.max(280, place.clientWidth);
  if (width !== made.width) made.setSize({ width, height: 220 });
})).observe(byId("main"));
drawPlots();
connect();
