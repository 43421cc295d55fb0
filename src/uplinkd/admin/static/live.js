// New messages, or new refusals, as they come: by server-sent events, at most so many rows in the page.
import { labelCells, writeTimes } from "./console.js";
import { stream } from "./stream.js";

const MOST = 200;
const feed = document.getElementById("feed");

function node(name, attributes = {}, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.append(...children);
  return made;
}

// What stands between backticks is code.
const ticks = (text) => text.split("`").map((part, place) => (place % 2 ? node("code", {}, part) : part));
const at = (time) => node("time", { "data-ms": time });
const deviceLink = (product, device) => (product && device
  ? node("a", { href: `/products/${encodeURIComponent(product)}/devices/${encodeURIComponent(device)}` }, device)
  : document.createTextNode(device));

function messageRow(each, labels) {
  let payload;
  if (each.text === null) payload = node("span", { class: "muted" }, `${labels.binary}, ${each.size} B`);
  else if (each.text === "") payload = node("span", { class: "muted" }, labels.empty);
  else payload = each.text.length > 240 ? `${each.text.slice(0, 240)}…` : each.text;
  return node("tr", { class: "new" },
    node("td", { class: "nowrap" }, at(each.generateTime)),
    node("td", { class: "break" }, deviceLink(each.productKey, each.deviceName), node("br"), node("span", { class: "muted" }, each.topic)),
    node("td", { class: "payload" }, node("a", { href: `/messages/${each.messageId}` }, payload)),
    node("td", {}, node("span", { class: "tag" }, each.origin)));
}

function refusalBox(each) {
  const box = node("article", { class: "refusal" });
  const facts = node("span", { class: "muted" }, at(each.time), ` · ${each.endpoint}${each.address ? ` · ${each.address}` : ""}${each.gateway ? ` · ${each.gateway}` : ""}`);
  box.append(
    node("header", {}, node("span", { class: "code" }, String(each.code || feed.dataset.note)), node("strong", {}, each.message), each.times > 1 ? ` × ${each.times.toLocaleString(document.documentElement.lang)} ` : " ", facts),
    node("p", { class: "reason" }, ...ticks(each.reason)));
  if (each.means) box.append(node("p", { class: "muted" }, ...ticks(each.means), " ", node("b", {}, ...ticks(each.advice))));
  box.append(node("footer", { class: "muted" }, deviceLink(each.productKey, each.deviceName), each.topic ? ` · ${each.topic}` : "", each.requestId ? ` · requestId ${each.requestId}` : ""));
  return box;
}

function follow(place, name, make) {
  const pause = document.getElementById("pause");
  const fill = (text, count) => text.replace("{n}", count.toLocaleString(document.documentElement.lang));
  let waiting = [];
  let skipped = 0;
  let paused = false;
  const tell = () => {
    if (paused) feed.textContent = fill(feed.dataset.paused, waiting.length + skipped);
    else feed.textContent = skipped ? `${feed.dataset.live} · ${fill(feed.dataset.skipped, skipped)}` : feed.dataset.live;
  };
  const show = (items) => {
    document.getElementById("nothing")?.remove();
    place.querySelector(".nothing")?.remove();
    for (const each of items.slice(-MOST)) place.prepend(make(each));
    while (place.children.length > MOST) place.lastElementChild.remove();
    writeTimes(place);
    if (place.localName === "tbody") labelCells(place.closest("table"));
  };
  const take = (told) => {
    skipped += told.skipped ?? 0;
    if (paused) {
      waiting.push(...told.items);
      if (waiting.length > MOST) skipped += waiting.splice(0, waiting.length - MOST).length;
    } else show(told.items);
    tell();
  };
  stream(`/api/v1/${name === "messages" ? "messages" : "logs"}/stream${location.search}`, name, take, {
    opened: tell,
    away: (why) => {
      feed.textContent = why || feed.dataset.away;
      feed.classList.toggle("bad", Boolean(why));
    },
  });
  pause?.addEventListener("click", () => {
    paused = !paused;
    pause.setAttribute("aria-pressed", String(paused));
    pause.textContent = paused ? pause.dataset.resume : pause.dataset.pause;
    if (!paused) {
      show(waiting);
      waiting = [];
    }
    tell();
  });
  document.getElementById("clear")?.addEventListener("click", () => {
    place.replaceChildren();
    waiting = [];
    skipped = 0;
    tell();
  });
}

if (feed?.dataset.stream === "messages") {
  const rows = document.getElementById("rows");
  follow(rows, "messages", (each) => messageRow(each, rows.dataset));
} else if (feed?.dataset.stream === "refusals" && !new URLSearchParams(location.search).get("requestId")) {
  follow(document.getElementById("refusals"), "refusals", refusalBox);
}
