"use strict";
const $ = (id) => document.getElementById(id);
const BOX_CHARACTERS = 40000;  // typing is slow in a text area with more characters
const HEAT_NATS = [0.05, 0.2, 0.5, 1, 2, 3, 5, 8];
const EXAMPLES = {
  Story: "Have you heard of the proud fox named Zoe? Zoe dreamed of one thing: to knit. Every Tuesday, Zoe tried to knit by a fountain, but the birds flew away.",
  Code: "def softmax(x):\n    e = [math.exp(v - max(x)) for v in x]\n    return [v / sum(e) for v in e]\n",
  Numbers: "3.14159265358979 1,000,000 2026-11-23 0xDEADBEEF 1e-5 ½ ²",
  Unicode: "Grüße! 你好，世界。 नमस्ते  مرحبا  🤹🏽‍♀️ naïve cafe\u0301 \u202eright to left\u202c zero\u200bwidth",
};
const number = (x, digits = 0) => x.toLocaleString("en", { minimumFractionDigits: digits, maximumFractionDigits: digits });
const percent = (p) => p >= 0.99 ? (100 * p).toFixed(2) + "%" : p >= 0.0995 ? (100 * p).toFixed(0) + "%" : p >= 0.00095 ? (100 * p).toFixed(1) + "%" : p >= 1e-5 ? (100 * p).toFixed(3) + "%" : "< 0.001%";

// Text enters the page only as text nodes, never as HTML.
function element(tag, properties = {}, ...children) {
  const node = document.createElement(tag);
  for (const [key, value] of Object.entries(properties)) {
    if (key.includes("-") || key === "role") node.setAttribute(key, value); else node[key] = value;
  }
  node.append(...children);
  return node;
}

// ---- requests

async function request(name, body, signal) {
  let response;
  try {
    response = await fetch("api/" + name, body && {
      method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(body), signal,
    });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Error("The server does not respond. Is it still running?");
  }
  if (!response.ok) {
    const answer = await response.json().catch(() => ({}));
    throw new Error(answer.error || `The server returned status ${response.status}.`);
  }
  return response;
}

// Calls `receive` with each line of a streamed answer; the last one has "done" or "error".
async function streamed(name, body, signal, receive) {
  const reader = (await request(name, body, signal)).body.pipeThrough(new TextDecoderStream()).getReader();
  let ended = false;
  for (let rest = "", chunk; !(chunk = await reader.read()).done;) {
    const lines = (rest + chunk.value).split("\n");
    rest = lines.pop();
    for (const message of lines.map((line) => JSON.parse(line))) {
      if (message.error) throw new Error(message.error);
      ended ||= Boolean(message.done);
      receive(message);
    }
  }
  if (!ended) throw new Error("The server stopped before the text was complete.");
}

// Wraps an async function so that a new call aborts the previous one.
function latestOnly(run) {
  let controller = null;
  return async (...args) => {
    controller?.abort();
    const current = controller = new AbortController();
    try {
      await run(current.signal, ...args);
    } catch (error) {
      if (error.name !== "AbortError") throw error;
    }
  };
}

// ---- the text: the content of the box, and the tail of a very long text

let tail = "";
let about = { tokenizers: [], missing: {}, models: [], limits: { characters: 8e6 } };
const box = $("text");
const fullText = () => box.value + tail;

function setText(text) {
  let end = Math.min(text.length, BOX_CHARACTERS);
  if (end < text.length && /[\uD800-\uDBFF]/.test(text[end - 1])) end--;  // do not split a surrogate pair
  box.value = text.slice(0, end);
  tail = text.slice(end);
  textChanged();
}

let timer = 0;
function textChanged() {
  $("tail").hidden = !tail;
  $("tail").firstChild.textContent = `and ${number(tail.length)} more characters`;
  clearTimeout(timer);
  timer = setTimeout(refresh, box.value.length + tail.length > 20000 ? 500 : 90);
}

function insert(text) {
  const { selectionStart, selectionEnd, value } = box;
  setText(value.slice(0, selectionStart) + text + value.slice(selectionEnd) + tail);
  box.setSelectionRange(selectionStart + text.length, selectionStart + text.length);
}
for (const [event, source] of [["paste", "clipboardData"], ["drop", "dataTransfer"]]) {
  box.addEventListener(event, (e) => {
    const text = e[source]?.getData("text/plain") ?? "";
    if (text.length + box.value.length <= BOX_CHARACTERS) return;  // the browser's own paste can be undone
    e.preventDefault();
    insert(text.replace(/\r\n?/g, "\n"));
  });
}
box.addEventListener("input", () => box.value.length > 2 * BOX_CHARACTERS ? setText(fullText()) : textChanged());
$("tail").lastChild.addEventListener("click", () => { tail = ""; textChanged(); box.focus(); });
$("clear").addEventListener("click", () => { setText(""); box.focus(); });
for (const [name, text] of Object.entries(EXAMPLES)) {
  const button = element("button", { className: "button small", type: "button", textContent: name });
  button.addEventListener("click", () => { setText(text); });
  $("examples").append(button);
}

// ---- tokens

const strict = new TextDecoder("utf-8", { fatal: true, ignoreBOM: true });
const bytesOf = (hex) => Uint8Array.from(hex.match(/../g) ?? [], (pair) => parseInt(pair, 16));
const hexOf = (bytes) => Array.from(bytes, (b) => b.toString(16).padStart(2, "0").toUpperCase()).join(" ");
function decoded(bytes) {
  try { return strict.decode(bytes); } catch { return null; }
}

// Splits bytes into [character, bytes] and, for bytes that are not UTF-8, [null, byte].
function characters(bytes) {
  const units = [];
  for (let offset = 0; offset < bytes.length;) {
    const lead = bytes[offset], length = lead < 0x80 ? 1 : lead < 0xe0 ? 2 : lead < 0xf0 ? 3 : 4;
    const slice = bytes.subarray(offset, offset + length), text = slice.length === length ? decoded(slice) : null;
    const used = text === null ? bytes.subarray(offset, offset + 1) : slice;
    units.push([text, used]);
    offset += used.length;
  }
  return units;
}

// Appends a token's text to a node, with marks for white space, control characters and bytes that are not UTF-8.
function drawToken(node, hex, { breaks = false } = {}) {
  let run = "";
  const flush = () => { if (run) node.append(run); run = ""; };
  const mark = (text, className = "m") => { flush(); node.append(element("span", { className, textContent: text })); };
  const units = characters(bytesOf(hex)), last = units.length - 1;
  units.forEach(([text, bytes], index) => {
    if (text === null) mark(hexOf(bytes), "u");
    else if (text === " ") mark("·");
    else if (text === "\n") { mark("↵"); if (breaks && index < last) run += "\n"; }
    else if (text === "\t") mark("⇥");
    else if (/^[\p{Cc}\p{Cf}\p{Co}\p{Cn}\p{Z}\u115f\u1160\u3164\ufe00-\ufe0f]$/u.test(text)) mark("U+" + text.codePointAt(0).toString(16).toUpperCase().padStart(4, "0"), "u");
    else run += (index === 0 && /^\p{M}/u.test(text) ? "\u25cc" : "") + text;
  });
  flush();
  return node;
}

// The text of a token for screen readers.
function spokenText(hex) {
  const text = decoded(bytesOf(hex));
  if (text === null) return "bytes " + hexOf(bytesOf(hex));
  if (!text.trim()) return [...text].map((c) => ({ " ": "space", "\n": "newline", "\t": "tab" })[c] ?? "blank").join(" ");
  return text.replace(/^ /, "space ");
}

// A list of tokens with keyboard navigation. `select` is called on a click, `look` on hover and focus.
class TokenList {
  constructor(container, { select = () => {}, look = () => {} }) {
    Object.assign(this, { container, select, look, items: [], starts: [], data: null });
    container.addEventListener("click", (e) => this.indexOf(e.target) >= 0 && this.choose(this.indexOf(e.target)));
    container.addEventListener("pointerover", (e) => this.indexOf(e.target) >= 0 && this.look(this.indexOf(e.target)));
    container.addEventListener("focusin", (e) => this.indexOf(e.target) >= 0 && this.look(this.indexOf(e.target)));
    container.addEventListener("pointerleave", () => this.look(-1));
    container.addEventListener("keydown", (e) => this.key(e));
  }

  indexOf(node) {
    const item = node.closest?.(".t");
    return item ? Number(item.dataset.index) : -1;
  }

  show(data, { className, mode = "text", next = false }) {
    this.data = data;
    this.starts = [0];
    this.container.classList.toggle("wide", mode !== "text");
    const special = new Set(data.special), items = [], nodes = [];
    data.token_bytes.forEach((hex, index) => {
      const item = element("span", { className: `t ${className(index)}${special.has(index) ? " special" : ""}`, role: "option", tabIndex: -1, "aria-selected": "false", "aria-label": `${spokenText(hex)}, id ${data.ids[index]}` });
      item.dataset.index = index;
      if (mode === "ids") item.textContent = data.ids[index];
      else if (mode === "bytes") item.textContent = hexOf(bytesOf(hex));
      else drawToken(item, hex, { breaks: true });
      // Allow a line break before a word, but not inside one.
      if (index && mode === "text" && /^(20|09|3\d|[89a-f])/.test(hex)) nodes.push(element("wbr"));
      items.push(item);
      nodes.push(item);
      if (mode === "text" && hex.endsWith("0a")) nodes.push("\n");  // outside the token, so that its color does not extend to the next line
      this.starts.push(this.starts[index] + hex.length / 2);
    });
    if (next) {
      const item = element("span", { className: "t next", role: "option", tabIndex: -1, "aria-selected": "false", "aria-label": "the predicted next token" }, "next?");
      item.dataset.index = items.length;
      items.push(item);
      nodes.push(element("wbr"), item);
    }
    this.items = items;
    if (items.length) items[0].tabIndex = 0;
    this.container.replaceChildren(...nodes);
  }

  choose(index) {
    for (const item of this.items) if (item.getAttribute("aria-selected") === "true") item.setAttribute("aria-selected", "false");
    this.items[index]?.setAttribute("aria-selected", "true");
    this.select(index);
    this.move(index);
    this.items[index].scrollIntoView({ block: "nearest" });
  }

  move(index) {
    const old = this.container.querySelector('.t[tabindex="0"]');
    if (old) old.tabIndex = -1;
    this.items[index].tabIndex = 0;
    this.items[index].focus();
  }

  key(event) {
    const index = this.indexOf(event.target);
    if (index < 0 || event.ctrlKey || event.metaKey || event.altKey) return;
    const last = this.items.length - 1;
    const target = { ArrowRight: Math.min(index + 1, last), ArrowLeft: Math.max(index - 1, 0), Home: 0, End: last, ArrowDown: this.neighbor(index, 1), ArrowUp: this.neighbor(index, -1) }[event.key];
    if (target !== undefined) { event.preventDefault(); this.move(target); }
    else if (event.key === "Enter" || event.key === " ") { event.preventDefault(); this.choose(index); }
  }

  // The index of the nearest token on the next line (step 1) or the previous line (step -1).
  neighbor(index, step) {
    const here = this.items[index].getClientRects()[0], x = here.left;
    let best = index, distance = Infinity, top = null;
    for (let i = index + step; i >= 0 && i < this.items.length; i += step) {
      const rect = this.items[i].getClientRects()[0];
      if (Math.abs(rect.top - here.top) < rect.height / 2) continue;
      if (top === null) top = rect.top;
      if (Math.abs(rect.top - top) > rect.height / 2) break;
      if (Math.abs(rect.left - x) < distance) { distance = Math.abs(rect.left - x); best = i; }
    }
    return best;
  }

  // Highlights the tokens that overlap this byte range of the text.
  highlight(from, to) {
    for (const item of this.highlighted ?? []) item.classList.remove("echo");
    this.highlighted = [];
    if (from >= to) return;
    let low = 0, high = this.starts.length - 1;
    while (low < high) { const middle = (low + high) >> 1; if (this.starts[middle + 1] > from) high = middle; else low = middle + 1; }
    for (let i = low; i < this.items.length && this.starts[i] < to; i++) { this.items[i].classList.add("echo"); this.highlighted.push(this.items[i]); }
  }
}

// ---- two tokenizers side by side

const panes = [0, 1].map((index) => {
  const choice = element("select", { "aria-label": `Tokenizer ${index + 1}` });
  const stats = element("dl", { className: "stats" });
  const note = element("p", { className: "note", hidden: true });
  const error = element("p", { className: "error", hidden: true, role: "alert" });
  const listing = element("div", { className: "tokens", role: "listbox", "aria-label": `Tokens of tokenizer ${index + 1}`, "data-empty": "The tokens of your text appear here." });
  const foot = element("div", { className: "pane-foot" });
  const card = element("div", { className: "card" }, element("div", { className: "pane-head" }, choice, stats), note, error, listing, foot);
  $("panes").append(card);
  const pane = { choice, stats, note, error, listing, foot, card, total: null };
  pane.list = new TokenList(listing, { look: (token) => showDetails(pane, token) });
  pane.update = latestOnly((signal) => updatePane(pane, signal));
  choice.addEventListener("change", () => { arrangePanes(); pane.update(); });
  return pane;
});

function showDetails(pane, index) {
  const other = panes[1 - panes.indexOf(pane)], { data, starts } = pane.list;
  if (!data || index < 0 || index >= data.ids.length) {
    other.list.highlight(0, 0);
    pane.foot.textContent = "Point at a token, or select one with the arrow keys, to see its details.";
    return;
  }
  other.list.highlight(starts[index], starts[index + 1]);
  const bytes = bytesOf(data.token_bytes[index]);
  const label = element("b"), copies = data.ids.filter((id) => id === data.ids[index]).length;
  drawToken(label, data.token_bytes[index]);
  pane.foot.replaceChildren(label, `  token ${number(index + 1)} · id ${data.ids[index]} · ${bytes.length} ${bytes.length === 1 ? "byte" : "bytes"} `, element("b", { textContent: hexOf(bytes) }), copies > 1 ? ` · ${number(copies)} times` : "");
}

function showStatistics(list, entries) {
  list.replaceChildren(...entries.map(([name, value]) => element("div", {}, element("dt", { textContent: name }), element("dd", { textContent: value }))));
}

async function updatePane(pane, signal) {
  const missing = about.missing[pane.choice.value];
  if (!pane.choice.value || missing) {
    pane.note.hidden = !missing;
    pane.note.textContent = missing ?? "";
    pane.error.hidden = true;
    pane.total = null;
    compare();
    return;
  }
  pane.listing.classList.add("busy");
  try {
    const data = await (await request("tokenize", { tokenizer: pane.choice.value, text: textWithinLimit() }, signal)).json();
    pane.error.hidden = true;
    pane.total = data.tokens;
    showStatistics(pane.stats, [
      [data.tokens === 1 ? "token" : "tokens", number(data.tokens)], ["bytes", number(data.bytes)],
      ["bytes per token", data.tokens ? number(data.bytes / data.tokens, 2) : "–"],
      ["distinct tokens", number(data.distinct)], ["vocabulary size", number(data.vocab_size)],
    ]);
    pane.note.hidden = data.tokens === data.ids.length;
    pane.note.textContent = `Only the first ${number(data.ids.length)} of ${number(data.tokens)} tokens are shown. The statistics cover all of them.`;
    pane.list.show(data, { className: (i) => "c" + i % 5, mode: currentView() });
    showDetails(pane, -1);
  } catch (error) {
    if (error.name === "AbortError") throw error;
    pane.error.textContent = error.message;
    pane.error.hidden = false;
    pane.total = null;
  } finally {
    if (!signal.aborted) pane.listing.classList.remove("busy");
  }
  compare();
}

function textWithinLimit() {
  const text = fullText();
  if (text.length > about.limits.characters) throw new Error(`The text has ${number(text.length)} characters; the limit is ${number(about.limits.characters)}.`);
  return text;
}

function compare() {
  const [left, right] = panes, line = $("comparison");
  if (!left.total || !right.total) { line.textContent = ""; return; }
  const ratio = right.total / left.total - 1;
  line.textContent = Math.abs(ratio) < 0.0005 ? "Both tokenizers need the same number of tokens."
    : `${right.choice.value} needs ${(100 * Math.abs(ratio)).toFixed(Math.abs(ratio) < 0.0995 ? 1 : 0)}% ${ratio < 0 ? "fewer" : "more"} tokens than ${left.choice.value}.`;
}

const currentView = () => document.querySelector("#view :checked").value;
$("view").addEventListener("change", () => panes.forEach((pane) => pane.list.data && pane.list.show(pane.list.data, { className: (i) => "c" + i % 5, mode: currentView() })));
function arrangePanes() {
  const { choice, listing, stats, foot, note, error } = panes[1];
  listing.hidden = stats.hidden = foot.hidden = !choice.value || choice.value in about.missing;
  if (!choice.value) note.hidden = error.hidden = true;
}

