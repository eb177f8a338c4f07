// Small charts in SVG: a line over the last minutes, and a bar of shares.
import { duration } from "./format.js";

const WIDTH = 300;
const HEIGHT = 40;
const LINE = 1; // room for the line's width above its highest point
const SVG = "http://www.w3.org/2000/svg";

// A line over the last seconds. label: what it shows. format: a value in words. most: how far its scale goes at least.
export class Sparkline {
  #points = [];
  #span = 1;
  #peak = ""; // what is said while no pointer is over it
  #label;
  #format;

  constructor(parent, label, format, most = 0) {
    this.#label = label;
    this.#format = format;
    this.most = most;
    this.svg = shape("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, preserveAspectRatio: "none", role: "img", class: "sparkline" });
    this.area = shape("path", { class: "area" });
    this.line = shape("path", { class: "line" });
    this.mark = shape("path", { class: "mark" });
    this.svg.append(this.area, this.line, this.mark);
    this.said = document.createElement("span");
    this.said.className = "said";
    parent.classList.add("chart");
    parent.append(this.svg, this.said);
    this.svg.addEventListener("pointermove", (event) => this.#say(event.offsetX / this.svg.clientWidth));
    this.svg.addEventListener("pointerleave", () => this.#say(null));
  }

  // points: [[seconds ago, value or null for a gap]], the oldest first. span: seconds from left to right.
  show(points, span) {
    this.#points = points;
    this.#span = span;
    const values = points.map(([, value]) => value).filter((value) => value !== null);
    const top = Math.max(this.most, ...values) || 1;
    const x = (ago) => (WIDTH * (span - ago)) / span;
    const y = (value) => HEIGHT - ((HEIGHT - LINE) * value) / top;
    const pieces = runs(points).map((run) => run.map(([ago, value]) => `${x(ago).toFixed(1)} ${y(value).toFixed(1)}`));
    this.line.setAttribute("d", pieces.map((run) => `M${run.join("L")}`).join(""));
    const closed = (run) => `M${run[0].split(" ")[0]} ${HEIGHT}L${run.join("L")}L${run.at(-1).split(" ")[0]} ${HEIGHT}Z`;
    this.area.setAttribute("d", pieces.map(closed).join(""));
    const most = values.length ? this.#format(Math.max(...values)) : "";
    const known = values.length ? `now ${this.#format(values.at(-1))}, most ${most}` : "no values";
    this.svg.setAttribute("aria-label", `${this.#label}, last ${duration(span)}: ${known}`);
    this.#peak = most && `most ${most}`;
    if (!this.mark.hasAttribute("d")) this.said.textContent = this.#peak;
  }

  // Says the value under the pointer. place: 0 to 1 from left to right.
  #say(place) {
    const ago = place === null ? null : this.#span * (1 - place);
    const known = this.#points.filter(([, value]) => value !== null);
    if (ago === null || !known.length) {
      this.mark.removeAttribute("d");
      this.said.textContent = this.#peak;
      return;
    }
    const nearest = known.reduce((best, point) => (Math.abs(point[0] - ago) < Math.abs(best[0] - ago) ? point : best));
    const x = (WIDTH * (this.#span - nearest[0])) / this.#span;
    this.mark.setAttribute("d", `M${x} 0V${HEIGHT}`);
    this.said.textContent = `${this.#format(nearest[1])}, ${nearest[0].toFixed(0)} s ago`;
  }
}

// Parts of a whole beside one another. names: the class of each part.
export class ShareBar {
  constructor(parent, label, names) {
    this.label = label;
    this.svg = shape("svg", { viewBox: "0 0 1000 10", preserveAspectRatio: "none", role: "img", class: "share" });
    this.parts = names.map((name) => shape("rect", { class: name, height: 10, y: 0 }));
    this.svg.append(...this.parts);
    parent.append(this.svg);
  }

  // shares: 0 to 1 each. said: the same in words.
  show(shares, said) {
    let at = 0;
    this.parts.forEach((part, index) => {
      part.setAttribute("x", (1000 * at).toFixed(1));
      part.setAttribute("width", (1000 * shares[index]).toFixed(1));
      at += shares[index];
    });
    this.svg.setAttribute("aria-label", `${this.label}: ${said}`);
  }
}

function runs(points) {
  const found = [];
  let before = null;
  for (const point of points) {
    const gap = before === null || before[0] - point[0] > 5; // the page was not shown meanwhile
    if (point[1] !== null && (gap || before[1] === null)) found.push([]);
    if (point[1] !== null) found.at(-1).push(point);
    before = point;
  }
  return found;
}

function shape(name, attributes) {
  const node = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  return node;
}
