// What every page has: times in the reader's zone, buttons that copy, questions before what cannot be undone, tabs.

export function writeTimes(root) {
  // Sweden writes years first, as ISO 8601 does: one form that no reader of either language takes for another.
  const format = new Intl.DateTimeFormat("sv-SE", { dateStyle: "short", timeStyle: "medium" });
  for (const each of root.querySelectorAll("time[data-ms]")) {
    const moment = new Date(Number(each.dataset.ms));
    each.dateTime = moment.toISOString();
    each.title = moment.toISOString();
    each.textContent = format.format(moment);
  }
}

// On a phone a row is a block, and each cell says of which column it is.
export function labelCells(table) {
  const names = [...table.querySelectorAll("thead th")].map((each) => (each.querySelector(".hidden") ? "" : each.textContent));
  for (const row of table.tBodies[0].rows) {
    names.forEach((name, place) => { if (name && row.cells[place]) row.cells[place].dataset.label = name; });
  }
}

export async function copyText(text) {
  if (navigator.clipboard) {
    await navigator.clipboard.writeText(text);
    return;
  }
  // Without HTTPS, and not on this machine, browsers have no clipboard API.
  const area = document.createElement("textarea");
  area.value = text;
  document.body.append(area);
  area.select();
  document.execCommand("copy");
  area.remove();
}

async function textOf(button) {
  if (!button.dataset.fetch) return button.dataset.copy;
  const answer = await fetch(button.dataset.fetch, { headers: { Accept: "application/json, text/plain" } });
  if (!answer.ok) throw new Error(`${answer.status} ${answer.statusText}`);
  return button.dataset.member ? (await answer.json())[button.dataset.member] : answer.text();
}

document.addEventListener("click", async (event) => {
  const button = event.target.closest("button");
  if (!button) return;
  if (button.dataset.confirm && !confirm(button.dataset.confirm)) {
    event.preventDefault();
    return;
  }
  if (button.matches(".copy")) {
    const label = button.textContent;
    try {
      await copyText(await textOf(button));
      button.textContent = button.dataset.done;
    } catch (fault) {
      button.textContent = fault.message;
    }
    setTimeout(() => { button.textContent = label; }, 1800);
  }
});

for (const list of document.querySelectorAll("[role=tablist]")) {
  const tabs = [...list.querySelectorAll("[role=tab]")];
  const show = (chosen) => {
    for (const tab of tabs) {
      tab.setAttribute("aria-selected", String(tab === chosen));
      tab.tabIndex = tab === chosen ? 0 : -1;
      document.getElementById(tab.getAttribute("aria-controls")).hidden = tab !== chosen;
    }
  };
  for (const tab of tabs) tab.addEventListener("click", () => show(tab));
  list.addEventListener("keydown", (event) => {
    const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (!step) return;
    const next = tabs[(tabs.indexOf(document.activeElement) + step + tabs.length) % tabs.length];
    show(next);
    next.focus();
  });
  show(tabs[0]);
}

for (const code of document.querySelectorAll("code[data-json]")) {
  try {
    const value = JSON.parse(code.textContent);
    // Numbers beyond 2^53 would lose digits: such a payload stays as it came.
    if (typeof value === "object" && !/\d{16,}/.test(code.textContent)) code.textContent = JSON.stringify(value, null, 2);
  } catch { /* not JSON: shown as it is */ }
}

for (const search of document.querySelectorAll("#q")) {
  document.addEventListener("keydown", (event) => {
    if (event.key === "/" && !event.target.closest("input, textarea, select")) {
      event.preventDefault();
      search.focus();
    }
  });
}

// What drops down closes by Escape, and by a click elsewhere.
const DROPPED = ".menu[open], .acts:not(.plain) > .act[open]";
document.addEventListener("keydown", (event) => {
  if (event.key !== "Escape") return;
  for (const each of document.querySelectorAll(DROPPED)) {
    each.open = false;
    each.querySelector("summary").focus();
  }
});
document.addEventListener("click", (event) => {
  for (const each of document.querySelectorAll(DROPPED)) if (!each.contains(event.target)) each.open = false;
});

for (const table of document.querySelectorAll(".scroll table")) labelCells(table);
writeTimes(document);
