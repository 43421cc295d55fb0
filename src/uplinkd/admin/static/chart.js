// A line chart over time in SVG: axes, areas, a hair line that reads values off. No library: four series at most, a few hundred points.

const NS = "http://www.w3.org/2000/svg";
const SHORTEST = 120_000;
const MARGIN = { left: 44, right: 8, top: 8, bottom: 20 };

function element(name, attributes, parent) {
  const made = document.createElementNS(NS, name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  if (parent) parent.append(made);
  return made;
}

function ceiling(value) {
  if (!(value > 0)) return 1;
  const power = 10 ** Math.floor(Math.log10(value));
  return [1, 2, 2.5, 5, 10].map((step) => step * power).find((step) => step >= value * 0.999);
}

export function short(value) {
  if (value === null || value === undefined) return "–";
  if (value >= 1e6) return `${+(value / 1e6).toPrecision(3)}M`;
  if (value >= 1e4) return `${+(value / 1e3).toPrecision(3)}k`;
  return String(+value.toPrecision(3));
}

export class Chart {
  // `series(samples)` gives [[name, values], …]; a value may be null, where the line has a gap.
  constructor(place, series, span) {
    this.place = place;
    this.series = series;
    this.span = span;
    this.samples = [];
    this.key = document.createElement("div");
    this.key.className = "key";
    place.after(this.key);
    place.addEventListener("pointermove", (event) => { this.at = event.offsetX; this.draw(); });
    place.addEventListener("pointerleave", () => { this.at = null; this.draw(); });
    new ResizeObserver(() => this.draw()).observe(place);
  }

  show(samples, span) {
    this.samples = samples;
    this.span = span;
    this.draw();
  }

  draw() {
    const { width, height } = this.place.getBoundingClientRect();
    if (!width) return;
    const lines = this.series(this.samples);
    const end = this.samples.length ? this.samples.at(-1).at : Date.now();
    // A server that was just started has little to show: the axis begins with it.
    const known = this.samples.length ? end - this.samples[0].at : 0;
    const span = Math.min(this.span, Math.max(known, SHORTEST));
    const begin = end - span;
    const top = ceiling(Math.max(0, ...lines.flatMap(([, values]) => values.filter((value) => value !== null))));
    const x = (at) => MARGIN.left + ((at - begin) / span) * (width - MARGIN.left - MARGIN.right);
    const y = (value) => height - MARGIN.bottom - (value / top) * (height - MARGIN.top - MARGIN.bottom);
    const svg = element("svg", { role: "img", "aria-label": this.describe(lines), viewBox: `0 0 ${width} ${height}` });
    for (let step = 0; step <= 4; step += 1) {
      const value = (top * step) / 4;
      element("line", { class: "grid", x1: MARGIN.left, x2: width - MARGIN.right, y1: y(value), y2: y(value) }, svg);
      if (step % 2 === 0) element("text", { x: MARGIN.left - 6, y: y(value) + 4, "text-anchor": "end" }, svg).textContent = short(value);
    }
    const second = span < 600_000 ? { second: "2-digit" } : {};
    const clock = new Intl.DateTimeFormat(document.documentElement.lang, { hour: "2-digit", minute: "2-digit", ...second, hourCycle: "h23" });
    for (let part = 0; part <= 3; part += 1) {
      const at = begin + (span * part) / 3;
      const anchor = ["start", "middle", "middle", "end"][part];
      element("text", { x: x(at), y: height - 4, "text-anchor": anchor }, svg).textContent = clock.format(at);
    }
    lines.forEach(([, values], index) => {
      let path = "";
      let first = null;
      let last = null;
      let pen = "M";
      this.samples.forEach((sample, place) => {
        const value = values[place];
        if (value === null || value === undefined || sample.at < begin) { pen = "M"; return; }
        // h0: a point without neighbours is seen, too.
        path += `${pen}${x(sample.at).toFixed(1)} ${y(value).toFixed(1)}${pen === "M" ? "h0" : ""}`;
        pen = "L";
        first ??= sample.at;
        last = sample.at;
      });
      if (index === 0 && path && !path.slice(1).includes("M")) {
        element("path", { class: "area s0", d: `${path}L${x(last)} ${y(0)}L${x(first)} ${y(0)}Z` }, svg);
      }
      if (path) element("path", { class: `s${index % 6}`, d: path }, svg);
    });
    let chosen = this.samples.length - 1;
    if (this.at !== null && this.at !== undefined && this.samples.length) {
      const wanted = begin + ((this.at - MARGIN.left) / (width - MARGIN.left - MARGIN.right)) * span;
      chosen = this.samples.reduce((best, sample, place) => (Math.abs(sample.at - wanted) < Math.abs(this.samples[best].at - wanted) ? place : best), 0);
      const hair = x(this.samples[chosen].at);
      element("line", { class: "hair", x1: hair, x2: hair, y1: MARGIN.top, y2: height - MARGIN.bottom }, svg);
    }
    this.place.replaceChildren(svg);
    this.key.replaceChildren(...lines.map(([name, values], index) => {
      const item = document.createElement("span");
      const dot = element("svg", { viewBox: "0 0 10 10", "aria-hidden": "true" });
      element("circle", { class: `s${index % 6}`, cx: 5, cy: 5, r: 5 }, dot);
      item.append(dot, `${name} ${short(values[chosen])}`);
      return item;
    }));
  }

  describe(lines) {
    const last = lines.map(([name, values]) => `${name} ${short(values.at(-1))}`).join(", ");
    return `${this.place.dataset.label}: ${last}`;
  }
}
