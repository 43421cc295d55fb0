// The overview's live part: figures and charts from the API's history, then one sample a second.
import { Chart, short } from "./chart.js";
import { stream } from "./stream.js";

const SPANS = { second: 15 * 60_000, minute: 24 * 3_600_000 };
const kept = { second: [], minute: [] };
let by = "second";

const codes = () => [...new Set(kept[by].flatMap((sample) => Object.keys(sample.refused)))].sort();
const doors = () => [...new Set(kept[by].flatMap((sample) => Object.keys(sample.connections)))].sort();
const charts = [
  ["chart-rate", (samples) => [["HTTPS", samples.map((each) => each.https)], ["MQTT", samples.map((each) => each.mqtt)]]],
  ["chart-latency", (samples) => [["p99", samples.map((each) => each.p99)], ["p50", samples.map((each) => each.p50)]]],
  ["chart-refused", (samples) => {
    const found = codes();
    return found.length ? found.map((code) => [code, samples.map((each) => each.refused[code] ?? 0)]) : [[document.getElementById("codes").dataset.nothing, samples.map(() => 0)]];
  }],
  ["chart-connections", (samples) => [
    [document.getElementById("chart-connections").dataset.online, samples.map((each) => each.online)],
    ...doors().map((door) => [door.toUpperCase(), samples.map((each) => each.connections[door] ?? 0)]),
  ]],
].map(([id, series]) => new Chart(document.getElementById(id), series, SPANS[by]));

const draw = () => { for (const chart of charts) chart.show(kept[by], SPANS[by]); };
const put = (id, text) => { document.getElementById(id).textContent = text; };
const count = (value) => (value === null ? "–" : value.toLocaleString("en"));
const milliseconds = (value) => (value === null ? "–" : `${value.toFixed(1)} ms`);

function parts(id, items) {
  document.getElementById(id).replaceChildren(...items.flatMap((item) => {
    const part = document.createElement("span");
    part.append(...item);
    return [part, " "];
  }));
}

async function load(which) {
  const answer = await fetch(`/api/v1/stats/history?by=${which}`);
  if (answer.ok) kept[which] = (await answer.json()).items;
}

function take(sample) {
  kept.second.push(sample);
  if (kept.second.length > 900) kept.second.shift();
  put("rate", short(sample.https + sample.mqtt));
  parts("ways", [[`HTTPS ${short(sample.https)}`], [`MQTT ${short(sample.mqtt)}`]]);
  if (sample.p99 !== null) {
    put("p99", milliseconds(sample.p99));
    put("p50", `p50 ${milliseconds(sample.p50)}`);
  }
  if (sample.online !== null) put("online", count(sample.online));
  put("connections", count(Object.values(sample.connections).reduce((sum, each) => sum + each, 0)));
  parts("doors", Object.entries(sample.connections).map(([door, open]) => [`${door.toUpperCase()} ${count(open)}`]));
  if (by === "second" && !document.hidden) draw();
}

const UNITS = ["B", "KiB", "MiB", "GiB", "TiB"];

function size(value) {
  if (value === null) return "–";
  const power = value ? Math.min(Math.floor(Math.log2(value) / 10), UNITS.length - 1) : 0;
  const scaled = value / 1024 ** power;
  return `${scaled.toFixed(power && scaled < 100 ? 1 : 0)} ${UNITS[power]}`;
}

function link(code) {
  const made = document.createElement("a");
  made.href = `/logs?code=${code}&since=1h`;
  made.append(code);
  return made;
}

// What costs a look at the engine and at the log of refusals: now and then, and only while somebody looks.
async function look() {
  if (document.hidden) return;
  const answer = await fetch("/api/v1/stats").catch(() => null);
  if (!answer?.ok) return;
  const stats = await answer.json();
  const refused = Object.entries(stats.refused);
  put("refused", count(refused.reduce((sum, [, times]) => sum + times, 0)));
  if (refused.length) parts("codes", refused.map(([code, times]) => [link(code), ` × ${count(times)}`]));
  else put("codes", document.getElementById("codes").dataset.nothing);
  put("stored", count(stats.messages));
  put("bytes", size(stats.bytes));
  document.getElementById("engine").hidden = stats.engine;
}

for (const button of document.querySelectorAll("[data-by]")) {
  button.addEventListener("click", async () => {
    by = button.dataset.by;
    for (const each of document.querySelectorAll("[data-by]")) each.setAttribute("aria-pressed", String(each === button));
    await load(by);
    draw();
  });
}

const feed = document.getElementById("feed");
await load("second");
draw();
stream("/api/v1/stats/stream", "stats", take, {
  opened: () => { feed.textContent = feed.dataset.live; },
  away: (why) => { feed.textContent = why || feed.dataset.away; },
});
setInterval(look, 5000);
document.addEventListener("visibilitychange", () => {
  if (document.hidden) return;
  draw();
  look();
});
