// Figures of consumer groups, looked at every two seconds while somebody sees them; and the times of forms, which people give in
// their own zone.
import { labelCells, writeTimes } from "./console.js";

const PAUSE = 2000;
const list = document.getElementById("groups");
const one = document.getElementById("group");
const words = document.getElementById("words")?.dataset;
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

// As the macro group_state in group_parts.html.
function showState(place, { paused, apps, webhook, consumers, open }) {
  let [look, text] = ["online", words.posting];
  if (paused) [look, text] = [open ? "disabled" : "inactive", words.paused];
  else if (open) [look, text] = ["disabled", words.silent];
  else if (!webhook) {
    look = consumers ? "online" : "offline";
    if (!apps) text = words.nowhere;
    else if (consumers === null) text = "–";
    else text = consumers ? words.taken.replace("{n}", number(consumers)) : words.none;
  }
  if (place.textContent !== text) place.textContent = text;
  place.className = `state ${look}`;
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

function putTime(name, moment) {
  const place = document.querySelector(`[data-${name}]`);
  if (!place || !moment) return;
  const time = document.createElement("time");
  time.dataset.ms = moment;
  place.replaceChildren(time);
  writeTimes(place);
}

function showHook(hook) {
  if (!hook) return;
  put(document, "accepted", number(hook.accepted));
  put(document, "failed", number(hook.failed));
  putTime("success", hook.lastSuccess);
  putTime("failure", hook.lastFailure);
  putTime("next", hook.nextTry);
}

// Parts in the reader's words, such as what was wrong, come from the page itself when they are others by now.
async function showParts(state) {
  const hook = document.getElementById("hook");
  const dead = document.getElementById("dead");
  const wanted = [];
  if (hook && state.webhook) {
    const { open, fault } = state.webhook;
    if (!hook.children.length || hook.dataset.open !== (open ? "1" : "") || hook.dataset.fault !== fault) wanted.push(hook);
  }
  const busy = dead.contains(document.activeElement) || dead.querySelector("details[open]") || location.search.includes("after=");
  if (!busy && dead.dataset.count !== String(state.dead)) wanted.push(dead);
  if (!wanted.length) return;
  const answer = await fetch(`/groups/${encodeURIComponent(one.dataset.name)}`);
  if (!answer.ok) return;
  const page = new DOMParser().parseFromString(await answer.text(), "text/html");
  for (const part of wanted) {
    const fresh = page.getElementById(part.id);
    if (!fresh) continue;
    part.replaceWith(fresh);
    for (const table of fresh.querySelectorAll(".scroll table")) labelCells(table);
    writeTimes(fresh);
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
          const each = page?.items.find((item) => item.name === row.dataset.group);
          show(row, each?.state ?? null);
          if (each) showState(row.querySelector(".state"), { ...each, apps: each.apps.length, open: each.webhookOpen });
        }
      } else {
        const state = await fetched(`/api/v1/groups/${encodeURIComponent(one.dataset.name)}/state`);
        show(one, state);
        if (state) {
          const { paused, apps, webhook } = one.dataset;
          const facts = { paused, webhook, apps: Number(apps), consumers: state.consumers.length, open: state.webhook?.open };
          showState(document.querySelector("h1 .state"), facts);
          showConsumers(state.consumers);
          await showParts(state);
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
