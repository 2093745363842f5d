"use strict";
/* Draws the curves of runs, and marks the records under the pointer or selected with the keyboard.

   report/page.py writes `curves`: {runs: [{label, columns: {step: [...], train_loss: [...], ...}, lost}], floor, uniform}.
   All columns of a run have the length of its `step`, with null for missing values. The same position is marked on all
   charts: a record of the run with most of them, and the nearest one of each other run. The axis, the smoothing and the
   range that is shown stay when the page loads itself again. */

const curves = JSON.parse(document.getElementById("curves").textContent);
const runs = curves.runs.filter((run) => run.columns.step.length);
const longest = runs.reduce((a, b) => (b.columns.step.length > a.columns.step.length ? b : a), runs[0]);
const colors = ["first", "c1", "c2", "c3", "c4", "c5"];
const margin = { left: 46, right: 10, top: 8, bottom: 24 };
const charts = [...document.querySelectorAll(".chart")].map((figure) => {
  const names = figure.dataset.names.split("|");
  const series = runs.flatMap((run, number) =>
    figure.dataset.series.split(" ").map((key, index) => ({
      key,
      run,
      name: runs.length === 1 ? names[index] : figure.dataset.series.includes("loss") ? run.label : "",
      // Of several runs, the color is that of the run, and the second curve of a chart is thin.
      style: runs.length > 1 ? colors[number % colors.length] : isThin(key) ? "second" : "first",
      values: run.columns[key],
    })).filter(({ values }) => values)
  );
  return {
    plot: figure.querySelector(".plot"),
    output: figure.querySelector("output"),
    logarithmic: figure.dataset.scale === "log",
    isLoss: figure.dataset.series.includes("train_loss"),
    series,
  };
});
function isThin(key) { return key === "train_loss" || key === "cpu_memory_bytes"; }
const noisy = ["train_loss", "gradient_norm", "tokens_per_s"];
const settings = new URLSearchParams(location.hash.slice(1));
let axis = ["step", "tokens", "wall_s"].includes(settings.get("axis")) ? settings.get("axis") : "step"; // on the x-axis
let smoothing = Math.min(0.95, Number(settings.get("smoothing")) || 0); // the share of the mean so far in the next mean
let zoom = settings.has("from") ? [Number(settings.get("from")), Number(settings.get("to"))] : null; // in units of the axis
let marked = null; // the index of the marked record of the longest run

// --- Numbers ---

const grouped = (value) => Math.round(value).toLocaleString("en-US");

function short(value, count = 3) {
  const size = Math.abs(value);
  for (const [unit, letter] of [[1e12, "T"], [1e9, "G"], [1e6, "M"], [1e3, "k"]]) {
    if (size >= unit) return `${Number((value / unit).toPrecision(count))}${letter}`;
  }
  return digits(value, count);
}

function labelsOf(ticks) { // with as many digits as tell neighbors apart
  for (let count = 3; ; count++) {
    const labels = ticks.map((tick) => short(tick, count));
    if (count === 10 || new Set(labels).size === labels.length) return labels;
  }
}

function digits(value, count) {
  const rounded = Number(value.toPrecision(count));
  return value !== 0 && Math.abs(value) < 1e-3 ? rounded.toExponential() : String(rounded);
}

function exact(key, value) {
  if (value === null || value === undefined) return "–";
  if (key.endsWith("_loss")) return value.toFixed(3);
  if (key.endsWith("_bytes")) return `${digits(value / 1e9, 3)} GB`;
  return key === "tokens_per_s" ? grouped(value) : digits(value, 4);
}

function positionText(run, index) {
  if (axis === "tokens") return `${grouped(run.columns.tokens[index])} tokens`;
  if (axis === "wall_s") return duration(run.columns.wall_s[index]);
  return `step ${grouped(run.columns.step[index])}`;
}

function duration(seconds) {
  const [hours, minutes] = [Math.floor(seconds / 3600), Math.floor((seconds % 3600) / 60)];
  if (hours) return `${hours} h ${minutes} min`;
  return minutes ? `${minutes} min ${Math.floor(seconds % 60)} s` : `${Number(seconds.toPrecision(3))} s`;
}

// --- Scales ---

function linearTicks(low, high, most) {
  const raw = (high - low) / most || 1;
  const power = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 5, 10].find((factor) => factor * power >= raw) * power;
  const ticks = [];
  for (let i = Math.ceil(low / step - 1e-9); i * step <= high + step * 1e-9; i++) ticks.push(i * step + 0); // + 0: no -0
  return ticks;
}

function logarithmicTicks(low, high, most) {
  for (const factors of [[1, 1.5, 2, 3, 4, 5, 6, 8], [1, 1.5, 2, 3, 5, 7], [1, 2, 5], [1, 3], [1]]) {
    const ticks = [];
    for (let power = Math.floor(Math.log10(low)); power <= Math.log10(high); power++) {
      ticks.push(...factors.map((factor) => factor * 10 ** power).filter((tick) => tick >= low && tick <= high));
    }
    if (ticks.length <= most) return ticks.length > 1 ? ticks : linearTicks(low, high, most);
  }
  return linearTicks(low, high, most);
}

function range() { // of the x-axis
  return zoom ?? [0, Math.max(...runs.map((run) => run.columns[axis].at(-1))) || 1];
}

function xScale(width) {
  const [low, high] = range();
  const toPixel = (value) => margin.left + ((value - low) / (high - low)) * (width - margin.left - margin.right);
  const toValue = (pixel) => low + ((pixel - margin.left) / (width - margin.left - margin.right)) * (high - low);
  const [unit, name] = axis !== "wall_s" ? [1, ""] : high < 120 ? [1, " s"] : high < 7200 ? [60, " min"] : [3600, " h"];
  const values = linearTicks(low / unit, high / unit, Math.max(2, Math.floor(width / 95)));
  const labels = axis === "step" ? values.map(grouped) : labelsOf(values);
  const ticks = values.map((tick, i) => ({ x: toPixel(tick * unit), label: labels[i] + name }));
  return { toPixel, toValue, ticks };
}

function yScale(chart, height) {
  const [first, last] = range();
  let values = chart.series.flatMap(({ run, values }) => values.filter((value, i) => value !== null && run.columns[axis][i] >= first && run.columns[axis][i] <= last));
  if (chart.isLoss && curves.floor !== null) values.push(curves.floor);
  if (chart.isLoss && curves.uniform !== null && !zoom) values.push(curves.uniform);
  if (chart.logarithmic) values = values.filter((value) => value > 0);
  let low = values.reduce((a, b) => Math.min(a, b), Infinity);
  let high = values.reduce((a, b) => Math.max(a, b), -Infinity);
  if (!values.length) [low, high] = [1, 10];
  const to = chart.logarithmic ? Math.log : (value) => value;
  if (!chart.logarithmic) low = Math.min(0, low);
  if (low === high) [low, high] = chart.logarithmic ? [low / 1.5, high * 1.5] : [low, high + 1];
  const padding = (to(high) - to(low)) * 0.04;
  const bottom = to(low) - (chart.logarithmic ? padding : 0);
  const top = to(high) + padding;
  const toPixel = (value) => height - margin.bottom - ((to(value) - bottom) / (top - bottom)) * (height - margin.top - margin.bottom);
  const most = Math.max(3, Math.floor(height / 38));
  const ticks = chart.logarithmic ? logarithmicTicks(Math.exp(bottom), Math.exp(top), most) : linearTicks(low, high, most);
  const unit = chart.series[0]?.key.endsWith("_bytes") ? "B" : "";
  const labels = labelsOf(ticks);
  return { toPixel, ticks: ticks.map((tick, i) => ({ y: toPixel(tick), label: tick ? labels[i] + unit : "0" })) };
}

// --- Drawing ---

function element(name, attributes, text) {
  const node = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  if (text !== undefined) node.textContent = text;
  return node;
}

/* Reduces many points to the lowest and the highest in each column of pixels; the curve looks the same. */
function thinPoints(points) {
  const result = [];
  let column = null;
  for (const point of points) {
    if (column === null || Math.floor(point[0]) !== column.x) {
      column = { x: Math.floor(point[0]), start: result.length };
      result.push(point, point);
    } else {
      if (point[1] < result[column.start][1]) result[column.start] = point;
      if (point[1] > result[column.start + 1][1]) result[column.start + 1] = point;
    }
  }
  return result;
}

/* The running mean of a column, which forgets earlier values; it begins with the first value, not with 0. */
function smoothed(values) {
  let [sum, weight] = [0, 0];
  return values.map((value) => {
    if (value === null || value === undefined) return value;
    sum = smoothing * sum + (1 - smoothing) * value;
    weight = smoothing * weight + (1 - smoothing);
    return sum / weight;
  });
}

function draw(chart) {
  const { clientWidth: width, clientHeight: height } = chart.plot;
  const svg = element("svg", { width, height, "aria-hidden": "true" });
  const x = xScale(width);
  const y = yScale(chart, height);
  for (const { y: at, label } of y.ticks) {
    svg.append(element("path", { class: "grid", d: `M${margin.left} ${at}H${width - margin.right}` }));
    svg.append(element("text", { x: margin.left - 8, y: at + 4, "text-anchor": "end" }, label));
  }
  const ground = height - margin.bottom;
  svg.append(element("path", { class: "zero", d: `M${margin.left} ${ground}H${width - margin.right}` }));
  for (const { x: at, label } of x.ticks) {
    const anchor = at > width - 30 ? "end" : at < margin.left + 10 ? "start" : "middle";
    svg.append(element("text", { x: anchor === "end" ? width - margin.right : at, y: height - 6, "text-anchor": anchor }, label));
  }
  const lines = [[curves.floor, "floor", "entropy"], [curves.uniform, "uniform", "a uniform guess, log V"]];
  for (const [value, className, text] of chart.isLoss ? lines : []) {
    const at = value === null ? -1 : y.toPixel(value);
    if (at < 0 || at > ground) continue;
    svg.append(element("path", { class: className, d: `M${margin.left} ${at}H${width - margin.right}` }));
    // The curves begin above on the left, and end below on the right.
    const place = className === "floor" ? { x: margin.left + 4, y: at - 5 } : { x: width - margin.right, y: at + 13, "text-anchor": "end" };
    svg.append(element("text", place, `${text}: ${value.toFixed(3)}`));
  }
  // The curves have an SVG of their own, which clips them to the range that is shown.
  const inside = width - margin.left - margin.right;
  const clip = svg.appendChild(element("svg", { class: "clip", x: margin.left, y: 0, width: inside, height: ground + 2, viewBox: `${margin.left} 0 ${inside} ${ground + 2}` }));
  for (const { key, run, values, style } of chart.series) {
    let points = (noisy.includes(key) ? smoothed(values) : values)
      .map((value, index) => [x.toPixel(run.columns[axis][index]), value])
      .filter(([, value]) => value !== null && !(chart.logarithmic && value <= 0))
      .map(([at, value]) => [at, y.toPixel(value)]);
    const few = points.length <= 60 && (points.length === 1 || points.length < values.length / 2) && !isThin(key);
    if (points.length > 2 * width && !zoom) points = thinPoints(points);
    const path = points.map(([at, level]) => `${at.toFixed(1)} ${level.toFixed(1)}`).join("L");
    const thin = isThin(key) && runs.length > 1;
    if (path) clip.append(element("path", { class: style + (thin ? " thin" : ""), d: `M${path}`, "stroke-width": isThin(key) ? 1.2 : 1.8 }));
    if (few) for (const [cx, cy] of points) clip.append(element("circle", { class: style, cx, cy, r: 3 }));
  }
  if (chart.isLoss && axis === "step") {
    for (const step of runs.flatMap((run) => run.lost)) {
      clip.append(element("path", { class: "lost", d: `M${x.toPixel(step)} ${ground}v-8` }));
    }
  }
  chart.marks = svg.appendChild(element("g", {}));
  chart.plot.replaceChildren(svg);
  Object.assign(chart, { x, y, height });
  showMarked(chart);
}

/* Shows the values of the marked records, or of the last ones, beside the chart's title, and their position in the chart. */
function showMarked(chart) {
  const index = marked ?? longest.columns.step.length - 1;
  const here = longest.columns[axis][index];
  const shown = chart.series.filter(({ key }) => runs.length === 1 || !isThin(key) || !chart.series.some((other) => !isThin(other.key)));
  const entries = shown.map(({ key, run, name, style, values }) => {
    const near = marked === null ? values.length - 1 : nearest(run.columns[axis], here);
    let at = near; // records without this value (such as validation loss) show the last earlier one
    while (at > 0 && values[at] === null) at--;
    const item = document.createElement("span");
    const value = document.createElement("b");
    value.textContent = exact(key, values[at]);
    if (name || runs.length > 1) item.append(Object.assign(document.createElement("i"), { className: style }), name ? `${name} ` : "");
    item.append(value, at === near || values[at] === null || runs.length > 1 ? "" : ` (${positionText(run, at)})`);
    return { at, run, values, style, item };
  });
  const where = document.createElement("span");
  where.textContent = positionText(longest, index);
  chart.output.replaceChildren(...entries.map(({ item }) => item), where);
  chart.plot.setAttribute("aria-valuenow", String(index + 1));
  chart.plot.setAttribute("aria-valuetext", [...chart.output.children].map((item) => item.textContent).join(", "));
  where.hidden = marked === null && (!chart.isLoss || runs.length > 1);
  if (!chart.marks) return;
  chart.marks.replaceChildren();
  if (marked === null) return;
  const isInside = (value) => value >= range()[0] && value <= range()[1];
  if (isInside(here)) {
    const at = chart.x.toPixel(here).toFixed(1);
    chart.marks.append(element("path", { class: "cross", d: `M${at} ${margin.top}V${chart.height - margin.bottom}` }));
  }
  for (const { at, run, values, style } of entries) {
    if (values[at] === null || !isInside(run.columns[axis][at])) continue;
    const point = { cx: chart.x.toPixel(run.columns[axis][at]), cy: chart.y.toPixel(values[at]) };
    if (Number.isFinite(point.cy)) chart.marks.append(element("circle", { class: style, r: 4.5, ...point }));
  }
}

function markRecord(index) {
  if (index === marked) return;
  marked = index;
  charts.forEach(showMarked);
}

/* The index of the value nearest to another, by bisection: the values are ascending. */
function nearest(values, value) {
  let [low, high] = [0, values.length - 1];
  while (high - low > 1) {
    const middle = (low + high) >> 1;
    if (values[middle] < value) low = middle;
    else high = middle;
  }
  return value - values[low] <= values[high] - value ? low : high;
}

/* Draws all charts after a change of the axis, the smoothing or the range, which the page's address keeps. */
function redraw() {
  const kept = { axis, smoothing, ...(zoom && { from: zoom[0], to: zoom[1] }) };
  try { history.replaceState(null, "", `#${new URLSearchParams(kept)}`); } catch { /* not allowed for some local files */ }
  document.querySelector(".reset").hidden = zoom === null;
  charts.forEach(draw);
}

// --- Events ---

for (const chart of charts) {
  const { plot } = chart;
  const last = longest.columns.step.length - 1;
  plot.setAttribute("aria-valuemax", String(last + 1));
  const pixel = (event) => event.clientX - plot.getBoundingClientRect().left;
  let start = null; // the pixel at which a drag began
  const selection = () => plot.querySelector(".selection") ?? plot.firstChild.appendChild(element("rect", { class: "selection", y: margin.top }));
  plot.addEventListener("pointermove", (event) => {
    markRecord(nearest(longest.columns[axis], chart.x.toValue(pixel(event))));
    if (start === null || Math.abs(pixel(event) - start) < 6) return;
    const [left, right] = [start, pixel(event)].sort((a, b) => a - b);
    for (const [key, value] of Object.entries({ x: left, width: right - left, height: chart.height - margin.top - margin.bottom })) selection().setAttribute(key, value);
  });
  plot.addEventListener("pointerdown", (event) => {
    start = pixel(event);
    plot.setPointerCapture(event.pointerId);
    markRecord(nearest(longest.columns[axis], chart.x.toValue(start)));
  });
  plot.addEventListener("pointerup", (event) => {
    const ends = [start ?? 0, pixel(event)].sort((a, b) => a - b).map(chart.x.toValue);
    const isDrag = start !== null && Math.abs(pixel(event) - start) >= 6;
    start = null;
    if (!isDrag) return;
    const [low, high] = range();
    zoom = [Math.max(low, ends[0]), Math.min(high, ends[1])];
    marked = null;
    redraw();
  });
  plot.addEventListener("pointercancel", () => { start = null; plot.querySelector(".selection")?.remove(); });
  plot.addEventListener("dblclick", () => { zoom = null; redraw(); });
  plot.addEventListener("pointerleave", (event) => event.pointerType === "mouse" && markRecord(null));
  plot.addEventListener("blur", () => markRecord(null));
  plot.addEventListener("keydown", (event) => {
    const current = marked ?? last;
    const page = Math.max(1, Math.round(last / 20));
    const targets = {
      ArrowLeft: current - 1, ArrowDown: current - 1, ArrowRight: marked === null ? current : current + 1,
      ArrowUp: marked === null ? current : current + 1, PageDown: current - page, PageUp: current + page, Home: 0, End: last,
    };
    if (event.key === "Escape") markRecord(null);
    else if (event.key in targets) markRecord(Math.min(last, Math.max(0, targets[event.key])));
    else return;
    event.preventDefault();
  });
  new ResizeObserver(() => draw(chart)).observe(plot);
}
if (charts.length) {
  const slider = document.querySelector(".smoothing input");
  const reset = document.querySelector(".reset");
  slider.value = smoothing;
  slider.addEventListener("input", () => { smoothing = Number(slider.value); redraw(); });
  reset.hidden = zoom === null;
  reset.addEventListener("click", () => { zoom = null; redraw(); });
  for (const input of document.querySelectorAll(".axis-choice input[type=radio]")) {
    input.checked = input.value === axis;
    input.addEventListener("change", () => { axis = input.value; zoom = marked = null; redraw(); });
  }
}
// The browser's own refresh does not load a page whose address has a fragment.
const refresh = document.querySelector("meta[http-equiv=refresh]");
if (refresh) setTimeout(() => location.reload(), 1000 * Number(refresh.content));
