// Figures of consumer groups, looked at every two seconds while somebody sees them; and the times of forms, which people give in
// their own zone.
import { writeTimes } from "./console.js";

const PAUSE = 2000;
const list = document.getElementById("groups");
const one = document.getElementById("group");
const number = (value) => value.toLocaleString("en");
const rate = (value) => (value === null ? "–" : value.toFixed(1));

function age(moment) {
  if (moment === null) return "–";
  const seconds = Math.max(0, Math.round((Date.now() - moment) / 1000));
  for (const [unit, length] of [["d", 86400], ["h", 3600], ["min", 60]]) {
    if (seconds >= 2 * length) return `${Math.floor(seconds / length)} ${unit}`;
  }
  return `${seconds} s`;
}

function put(root, name, text) {
  const place = root.querySelector(`[data-${name}]`);
  if (place && place.textContent !== text) place.textContent = text;
}

function show(root, state) {
  put(root, "lag", state ? number(state.lag) : "–");
  put(root, "rate", state ? rate(state.rate) : "–");
  put(root, "oldest", state ? age(state.oldest) : "–");
  put(root, "dead", state ? number(state.dead) : "–");
  put(root, "held", state ? number(state.held) : "–");
  put(root, "retrying", state ? number(state.retrying) : "–");
}

function showConsumers(consumers) {
  const place = document.getElementById("consumers");
  if (!place) return;
  const items = consumers.map((each) => {
    const item = document.createElement("li");
    const more = document.createElement("span");
    more.className = "muted";
    more.textContent = `${each.address} · ${each.client} · ${place.dataset.held.replace("{n}", number(each.held))}`;
    item.append(`${each.app} `, more);
    return item;
  });
  if (!items.length) {
    const item = document.createElement("li");
    item.className = "muted";
    item.textContent = place.dataset.nothing;
    items.push(item);
  }
  place.replaceChildren(...items);
}

function showHook(hook) {
  if (!hook) return;
  put(document, "accepted", number(hook.accepted));
  put(document, "failed", number(hook.failed));
  const success = document.querySelector("[data-success]");
  if (success && hook.lastSuccess) {
    const time = document.createElement("time");
    time.dataset.ms = hook.lastSuccess;
    success.replaceChildren(time);
    writeTimes(success);
  }
}

async function fetched(path) {
  const answer = await fetch(path);
  if (answer.status === 401) location.reload();
  return answer.ok ? answer.json() : null;
}

async function look() {
  if (!document.hidden) {
    try {
      if (list) {
        const page = await fetched("/api/v1/groups");
        for (const row of list.tBodies[0].rows) {
          show(row, page?.items.find((each) => each.name === row.dataset.group)?.state ?? null);
        }
      } else {
        const state = await fetched(`/api/v1/groups/${encodeURIComponent(one.dataset.name)}/state`);
        show(one, state);
        if (state) {
          showConsumers(state.consumers);
          showHook(state.webhook);
        }
      }
    } catch { /* the server is away: what was seen last stays, and is looked for again */ }
  }
  setTimeout(look, PAUSE);
}

if (list || one) setTimeout(look, 1000);

for (const choice of document.querySelectorAll("[data-when]")) {
  const form = choice.form;
  const label = form.querySelector("[data-time]");
  const [typed, sent] = label.querySelectorAll("input");
  const toggle = () => {
    label.hidden = choice.value !== "time";
    typed.required = choice.value === "time";
  };
  const send = () => { sent.value = typed.value ? String(new Date(typed.value).getTime()) : ""; };
  choice.addEventListener("change", toggle);
  typed.addEventListener("input", send);
  toggle();
}
