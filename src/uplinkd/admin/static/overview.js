// The overview's live part: figures and charts from the API's history, then one sample a second.
import { Chart, short } from "./chart.js";

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
    return found.length ? found.map((code) => [code, samples.map((each) => each.refused[code] ?? 0)]) : [["0", samples.map(() => 0)]];
  }],
  ["chart-connections", (samples) => doors().map((door) => [door.toUpperCase(), samples.map((each) => each.connections[door] ?? 0)])],
].map(([id, series]) => new Chart(document.getElementById(id), series, SPANS[by]));

const draw = () => { for (const chart of charts) chart.show(kept[by], SPANS[by]); };
const put = (id, text) => { document.getElementById(id).textContent = text; };
const milliseconds = (value) => (value === null ? "–" : `${value.toFixed(1)} ms`);

async function load(which) {
  const answer = await fetch(`/api/v1/stats/history?by=${which}`);
  if (answer.ok) kept[which] = (await answer.json()).items;
}

function take(sample) {
  kept.second.push(sample);
  if (kept.second.length > 900) kept.second.shift();
  put("rate", short(sample.https + sample.mqtt));
  put("ways", `HTTPS ${short(sample.https)} · MQTT ${short(sample.mqtt)}`);
  if (sample.p99 !== null) put("p99", milliseconds(sample.p99));
  put("connections", Object.values(sample.connections).reduce((sum, count) => sum + count, 0));
  put("doors", Object.entries(sample.connections).map(([door, count]) => `${door.toUpperCase()} ${count}`).join(" "));
  if (by === "second" && !document.hidden) draw();
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
const source = new EventSource("/api/v1/stats/stream");
source.addEventListener("open", () => { feed.textContent = feed.dataset.live; });
source.addEventListener("error", () => { feed.textContent = feed.dataset.away; });
source.addEventListener("stats", (event) => take(JSON.parse(event.data)));
document.addEventListener("visibilitychange", () => { if (!document.hidden) draw(); });
