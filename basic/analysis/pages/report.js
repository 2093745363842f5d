"use strict";
/* Draws the curves of a run, and marks the record under the pointer or selected with the keyboard.

   report.py writes `curves`: {columns: {step: [...], train_loss: [...], ...}, floor, lost}. All columns have the length
   of `step`, with null for missing values. The same record is marked on all charts. */

const curves = JSON.parse(document.getElementById("curves").textContent);
const columns = curves.columns;
const margin = { left: 46, right: 10, top: 8, bottom: 24 };
const charts = [...document.querySelectorAll(".chart")].map((figure) => ({
  plot: figure.querySelector(".plot"),
  output: figure.querySelector("output"),
  logarithmic: figure.dataset.scale === "log",
  isLoss: figure.dataset.series.includes("train_loss"),
  series: figure.dataset.series.split(" ").map((key, number) => ({
    key,
    name: figure.dataset.names.split("|")[number],
    style: key === "train_loss" ? "second" : "first",
    values: columns[key],
  })),
}));
let axis = "step"; // the column on the x-axis
let smoothing = 0; // the share of the mean so far in the next mean; evaluations and rates are shown as they are
const noisy = ["train_loss", "gradient_norm", "tokens_per_s"];
let marked = null; // the index of the marked record

// --- Numbers ---

const grouped = (value) => Math.round(value).toLocaleString("en-US");

function short(value, count = 3) {
  const size = Math.abs(value);
  for (const [unit, letter] of [[1e12, "T"], [1e9, "G"], [1e6, "M"], [1e3, "k"]]) {
    if (size >= unit) return `${Number((value / unit).toPrecision(count))}${letter}`;
  }
  return digits(value, count);
}

function labelsOf(ticks) { // with as many digits as tell neighbours apart
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
  return key === "tokens_per_s" ? grouped(value) : digits(value, 4);
}

function positionText(index) {
  if (axis === "tokens") return `${grouped(columns.tokens[index])} tokens`;
  if (axis === "wall_s") return duration(columns.wall_s[index]);
  return `step ${grouped(columns.step[index])}`;
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

function xScale(width) {
  const values = columns[axis];
  const last = values.length ? values[values.length - 1] : 1;
  const toPixel = (value) => margin.left + (value / (last || 1)) * (width - margin.left - margin.right);
  const [unit, name] = axis !== "wall_s" ? [1, ""] : last < 120 ? [1, " s"] : last < 7200 ? [60, " min"] : [3600, " h"];
  const ticks = linearTicks(0, last / unit, Math.max(2, Math.floor(width / 95))).map((tick) => ({
    x: toPixel(tick * unit),
    label: (axis === "step" ? grouped(tick) : short(tick)) + name,
  }));
  return { toPixel, ticks };
}

function yScale(chart, height) {
  let values = chart.series.flatMap(({ values }) => values).filter((value) => value !== null);
  if (chart.isLoss && curves.floor !== null) values.push(curves.floor);
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
  const labels = labelsOf(ticks);
  return { toPixel, ticks: ticks.map((tick, i) => ({ y: toPixel(tick), label: labels[i] })) };
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
  if (chart.isLoss && curves.floor !== null) {
    svg.append(element("path", { class: "floor", d: `M${margin.left} ${y.toPixel(curves.floor)}H${width - margin.right}` }));
  }
  for (const { key, values, style } of chart.series) {
    let points = (noisy.includes(key) ? smoothed(values) : values)
      .map((value, index) => [x.toPixel(columns[axis][index]), value])
      .filter(([, value]) => value !== null && !(chart.logarithmic && value <= 0))
      .map(([at, value]) => [at, y.toPixel(value)]);
    const few = points.length <= 60 && (points.length === 1 || values.includes(null));
    if (points.length > 2 * width) points = thinPoints(points);
    const path = points.map(([at, level]) => `${at.toFixed(1)} ${level.toFixed(1)}`).join("L");
    if (path) svg.append(element("path", { class: style, d: `M${path}`, "stroke-width": style === "first" ? 1.8 : 1.2 }));
    if (few) for (const [cx, cy] of points) svg.append(element("circle", { class: style, cx, cy, r: 3 }));
  }
  if (chart.isLoss && axis === "step") {
    for (const step of curves.lost) {
      svg.append(element("path", { class: "lost", d: `M${x.toPixel(step)} ${ground}v-8` }));
    }
  }
  chart.marks = svg.appendChild(element("g", {}));
  chart.plot.replaceChildren(svg);
  Object.assign(chart, { x, y, height });
  showMarked(chart);
}

/* Shows the values of the marked record, or of the last one, beside the chart's title, and its position in the chart. */
function showMarked(chart) {
  const index = marked ?? columns.step.length - 1;
  const entries = chart.series.map(({ key, name, style, values }) => {
    let at = index; // records without this value (such as validation loss) show the last earlier one
    while (at > 0 && values[at] === null) at--;
    const item = document.createElement("span");
    const value = document.createElement("b");
    value.textContent = exact(key, values[at]);
    if (name) item.append(Object.assign(document.createElement("i"), { className: style }), `${name} `);
    item.append(value, at === index || values[at] === null ? "" : ` (${positionText(at)})`);
    return { at, values, style, item };
  });
  const where = document.createElement("span");
  where.textContent = positionText(index);
  chart.output.replaceChildren(...entries.map(({ item }) => item), where);
  chart.plot.setAttribute("aria-valuenow", String(index + 1));
  chart.plot.setAttribute("aria-valuetext", [...chart.output.children].map((item) => item.textContent).join(", "));
  where.hidden = marked === null && !chart.isLoss;
  if (!chart.marks) return;
  chart.marks.replaceChildren();
  if (marked === null) return;
  const at = chart.x.toPixel(columns[axis][index]).toFixed(1);
  chart.marks.append(element("path", { class: "cross", d: `M${at} ${margin.top}V${chart.height - margin.bottom}` }));
  for (const { at, values, style } of entries) {
    if (values[at] === null) continue;
    const point = { cx: chart.x.toPixel(columns[axis][at]), cy: chart.y.toPixel(values[at]) };
    if (Number.isFinite(point.cy)) chart.marks.append(element("circle", { class: style, r: 4.5, ...point }));
  }
}

function markRecord(index) {
  if (index === marked) return;
  marked = index;
  charts.forEach(showMarked);
}

/* The record nearest to a pixel, by bisection: x is ascending. */
function nearest(chart, pixel) {
  const at = (index) => chart.x.toPixel(columns[axis][index]);
  let [low, high] = [0, columns.step.length - 1];
  while (high - low > 1) {
    const middle = (low + high) >> 1;
    if (at(middle) < pixel) low = middle;
    else high = middle;
  }
  return pixel - at(low) <= at(high) - pixel ? low : high;
}

// --- Events ---

for (const chart of charts) {
  const last = columns.step.length - 1;
  chart.plot.setAttribute("aria-valuemax", String(last + 1));
  const follow = (event) => markRecord(nearest(chart, event.clientX - chart.plot.getBoundingClientRect().left));
  chart.plot.addEventListener("pointermove", follow);
  chart.plot.addEventListener("pointerdown", follow);
  chart.plot.addEventListener("pointerleave", (event) => event.pointerType === "mouse" && markRecord(null));
  chart.plot.addEventListener("blur", () => markRecord(null));
  chart.plot.addEventListener("keydown", (event) => {
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
  new ResizeObserver(() => draw(chart)).observe(chart.plot);
}
document.querySelectorAll(".smoothing input").forEach((input) =>
  input.addEventListener("input", () => {
    smoothing = Number(input.value);
    charts.forEach(draw);
  })
);
document.querySelectorAll(".axis-choice input[type=radio]").forEach((input) =>
  input.addEventListener("change", () => {
    axis = input.value;
    charts.forEach(draw);
  })
);
