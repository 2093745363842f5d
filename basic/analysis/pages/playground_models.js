// ---- which model: a menu of models, and one of the checkpoints of the chosen model

class ModelChoice {
  constructor(label, changed) {
    this.name = element("select", { "aria-label": label });
    this.step = element("select", { "aria-label": `Checkpoint: ${label}`, className: "light" });
    this.name.addEventListener("change", () => { this.fillSteps(); changed(); });
    this.step.addEventListener("change", changed);
  }

  fill(models, { none = false, chosen = 0 } = {}) {
    this.name.replaceChildren(...models.map(({ name }) => element("option", { value: name, textContent: name })));
    if (none) this.name.append(element("option", { value: "", textContent: "no second model" }));
    this.name.value = models[chosen]?.name ?? "";
    this.fillSteps();
  }

  fillSteps() {
    const steps = [...about.models.find(({ name }) => name === this.name.value)?.checkpoints ?? []].reverse();
    const option = (step, i) => element("option", { value: i ? step : "", textContent: `step ${number(step)}${i ? "" : ", newest"}` });
    this.step.replaceChildren(...steps.map(option));
    this.step.hidden = !steps.length;
  }

  get value() {
    return { model: this.name.value, checkpoint: this.step.value === "" ? null : Number(this.step.value) };
  }
}

const sampling = () => ({
  max_new_tokens: Number($("length").value), temperature: Number($("temperature").value), top_p: Number($("top-p").value),
  top_k: Number($("top-k").value) || null, seed: $("seed").value.trim() === "" ? null : Number($("seed").value),
});
for (const [id, shown] of [["temperature", (x) => number(x, 2)], ["top-p", (x) => number(x, 2)], ["top-k", (x) => x ? number(x) : "all"], ["length", (x) => number(x)], ["samples", (x) => number(x)]]) {
  const show = () => { $(id).parentElement.querySelector("output").textContent = shown(Number($(id).value)); };
  $(id).addEventListener("input", show);
  show();
}

// ---- texts of two models side by side, colored by loss

const level = (nats) => nats === null ? "-" : HEAT_NATS.filter((bound) => nats >= bound).length;

class ModelPane {
  constructor(number) {
    this.choice = new ModelChoice(`Model ${number}`, () => { this.reset(); arrangeModels(); this.update(); });
    const part = (tag, className, properties = {}) => (this[className] = element(tag, { className, ...properties }));
    const button = (text, act) => {
      const node = element("button", { className: "button small", type: "button", textContent: text });
      node.addEventListener("click", act);
      return node;
    };
    this.card = element("div", { className: "card" },
      element("div", { className: "pane-head" },
        element("div", { className: "row" }, this.choice.name, this.choice.step), part("p", "facts muted"), part("dl", "stats"),
        part("div", "after", { hidden: true })),
      part("p", "note", { hidden: true }), part("p", "error", { hidden: true, role: "alert" }), part("div", "stream", { hidden: true }),
      part("div", "tokens scored", { role: "listbox", "aria-label": `Tokens of model ${number}, colored by loss`, "data-empty": "Type some text to see the loss of each token." }));
    this.facts = this["facts muted"];
    this.listing = this["tokens scored"];
    this.after.append(element("span", { className: "muted", textContent: "Generated text is underlined. " }),
      button("Add to the text", () => setText(this.text)), " ", button("Discard", () => { this.reset(); this.update(); }));
    this.list = new TokenList(this.listing, { select: (index) => inspect(this, index) });
    this.continuation = this.running = null;  // { prompt, text } after a generation; the AbortController of one
    this.update = latestOnly((signal) => this.score(signal));
    $("models").append(this.card);
  }

  get text() { return this.continuation ? this.continuation.prompt + this.continuation.text : fullText(); }
  get isShown() { return Boolean(this.choice.name.value); }

  say(kind, text) {
    this[kind].textContent = text;
    this[kind].hidden = !text;
  }

  reset() {
    this.running?.abort();
    this.running = this.continuation = null;
    this.showScore();
  }

  showScore() {
    this.stream.hidden = true;
    this.stream.classList.remove("live");
    this.listing.hidden = this.stats.hidden = false;
    this.after.hidden = !this.continuation;
  }

  async score(signal) {
    if (!this.isShown) return;
    if (!this.facts.textContent) this.facts.textContent = "loading the model …";
    this.listing.classList.add("busy");
    try {
      textWithinLimit();
      const { continuation, text } = this;
      const data = await (await request("score", { text, keep_end: Boolean(continuation), ...this.choice.value }, signal)).json();
      const { parameters, context_length } = data.model;
      this.facts.textContent = `${number(parameters)} parameters · context length ${number(context_length)}`;
      this.say("error", "");
      this.say("note", data.ids.length === data.tokens ? "" : `The context length is ${number(context_length)} tokens. Shown: the ${data.first ? "last" : "first"} ${number(data.ids.length)} of ${number(data.tokens)}.`);
      const newFrom = continuation ? new TextEncoder().encode(continuation.prompt).length : Infinity;
      const lengths = data.token_bytes.map((hex) => hex.length / 2);
      let end = continuation && data.first ? new TextEncoder().encode(text).length - lengths.reduce((a, b) => a + b, 0) : 0;
      const isNew = lengths.map((length) => (end += length) > newFrom);
      this.list.show(data, { className: (i) => "h" + level(data.nats[i]) + (isNew[i] ? " new" : ""), next: data.likeliest.length > data.ids.length });
      showStatistics(this.stats, data.mean_nats === null ? [] : [
        [data.tokens === 1 ? "token" : "tokens", number(data.tokens)], ["nats per token", number(data.mean_nats, 3)],
        ["perplexity", number(Math.exp(data.mean_nats), 2)], ["bits per byte", data.bits_per_byte === null ? "–" : number(data.bits_per_byte, 3)],
      ]);
      inspect(this, -1);
    } catch (error) {
      if (error.name === "AbortError") throw error;
      this.say("error", error.message);
    } finally {
      if (!signal.aborted) this.listing.classList.remove("busy");
    }
  }

  async generate(count) {
    this.running?.abort();
    const current = this.running = new AbortController(), prompt = this.text, texts = [];
    const shown = (prompt.length > 1500 ? "… " : "") + prompt.slice(-1500);
    this.stream.replaceChildren(element("span", { className: "prompt", textContent: shown }));
    this.stream.hidden = false;
    this.stream.classList.add("live");
    this.listing.hidden = this.stats.hidden = this.after.hidden = true;
    this.say("error", "");
    this.say("note", "");
    let problem = "", updates = 0;
    const body = { prompt, num_samples: count, ...sampling(), ...this.choice.value };
    try {
      await streamed("generate", body, current.signal, ({ seen, tokens, text, sample = 0 }) => {
        if (seen < tokens) this.say("note", `The prompt has ${number(tokens)} tokens; the model uses the last ${number(seen)}.`);
        if (text === undefined) return;
        if (texts[sample] === undefined) this.stream.append(count > 1 ? this.sampleNode(prompt, texts, sample) : document.createTextNode(""));
        texts[sample] = (texts[sample] ?? "") + text;
        (count > 1 ? this.stream.lastChild.firstChild : this.stream.lastChild).appendData(text);
        this.stream.scrollTop = this.stream.scrollHeight;
        updates++;
      });
    } catch (error) {
      if (error.name !== "AbortError") problem = error.message;
    }
    if (this.running !== current) return 0;  // another generation has started, or the text was changed
    this.running = null;
    this.stream.classList.remove("live");
    if (texts.length === 1 && count === 1) this.continuation = { prompt, text: texts[0] };
    if (texts.length <= 1) {
      await this.update();
      if (!this.running) this.showScore();
    }
    if (problem) this.say("error", problem);
    return updates;
  }

  sampleNode(prompt, texts, sample) {
    const node = element("div", { className: "sample" }, document.createTextNode(""));
    node.tabIndex = 0;
    node.title = "Click to see the loss of each token";
    const use = () => { this.continuation = { prompt, text: texts[sample] }; this.update(); this.showScore(); };
    node.addEventListener("click", () => this.running || use());
    node.addEventListener("keydown", (e) => e.key === "Enter" && !this.running && use());
    return node;
  }
}

const modelPanes = [new ModelPane(1), new ModelPane(2)];
function arrangeModels() {
  const second = modelPanes[1];
  for (const node of second.card.children) node.classList.toggle("away", !second.isShown && !node.contains(second.choice.name));
  for (const node of [second.stats, second.facts]) node.classList.toggle("away", !second.isShown);
}

let stopped = false;
async function generate() {
  stopped = false;
  clearTimeout(timer);  // a pending text change must not stop this generation
  resetIfTextChanged();
  const started = performance.now(), count = Number($("samples").value);
  $("stop").disabled = false;
  $("progress").textContent = "Generating …";
  const updates = await Promise.all(modelPanes.filter((pane) => pane.isShown).map((pane) => pane.generate(count)));
  if (modelPanes.some((pane) => pane.running)) return;
  $("stop").disabled = true;
  $("progress").textContent = `${stopped ? "Stopped" : "Done"}: ${number(updates.reduce((a, b) => a + b, 0))} tokens in ${number((performance.now() - started) / 1000, 1)} s`;
  $("go").textContent = modelPanes.some((pane) => pane.continuation) ? "Generate more" : "Generate";
}
function stopGenerating() {
  stopped = true;
  modelPanes.forEach((pane) => pane.running?.abort());
}
$("controls").addEventListener("submit", (e) => { e.preventDefault(); generate(); });
$("stop").addEventListener("click", stopGenerating);

function inspect(pane, index) {
  const panel = $("inspector"), data = pane.list.data;
  const likeliest = data?.likeliest[index];
  panel.classList.toggle("idle", index < 0);
  if (index < 0 || !data) {
    panel.replaceChildren(element("h2", { textContent: "Select a token" }), element("p", { className: "muted", textContent: "to see the ten most probable tokens at its position." }));
    return;
  }
  const isNext = index >= data.ids.length;
  const close = element("button", { className: "button small", id: "close", type: "button", textContent: "Close" });
  close.addEventListener("click", () => { inspect(pane, -1); pane.list.items[index].focus(); });
  const big = element("p", { className: "big" });
  if (isNext) big.append("Prediction"); else drawToken(big, data.token_bytes[index]);
  const facts = element("p", { className: "muted" });
  const title = isNext ? "Next token" : `Token ${number(data.first + index + 1)} · id ${data.ids[index]}`;
  const whose = modelPanes[1].isShown ? [element("p", { className: "muted", textContent: pane.choice.name.value })] : [];
  panel.replaceChildren(element("div", { className: "row between" }, element("h2", { textContent: title }), close), ...whose, big, facts);
  if (!likeliest) { facts.textContent = "The first token has no context, so the model does not predict it."; return; }
  const actual = isNext ? null : data.ids[index];
  const p = isNext ? null : likeliest.find(([id]) => id === actual)?.[1] ?? Math.exp(-data.nats[index]);
  if (!isNext) facts.textContent = `probability ${percent(p)} · loss ${number(data.nats[index], 3)} nats · ${data.ranks[index] === 1 ? "most probable" : "rank " + number(data.ranks[index])}`;
  else facts.textContent = "the most probable tokens after this text";
  const list = element("ol", { "aria-label": "Most probable tokens" });
  const row = (id, hex, probability, className = "") => {
    const label = drawToken(element("span", { className: "token" }), hex);
    label.title = "id " + id;
    const fill = element("i");
    fill.style.width = 100 * probability + "%";
    return element("li", { className: (id === actual ? "actual " : "") + className }, fill, label, element("span", { textContent: percent(probability) }));
  };
  for (const [id, probability] of likeliest) list.append(row(id, data.names[id] ?? "", probability));
  if (!isNext && !likeliest.some(([id]) => id === actual)) list.append(row(actual, data.token_bytes[index], p, "gap"));
  panel.append(list);
}
$("legend").setAttribute("aria-label", "Color scale: the loss of a token, from 0 to more than 8 nats");
$("legend").append("low loss", ...Array.from({ length: 9 }, (_, i) => element("i", { className: "h" + i, title: i === 8 ? "more than 8 nats" : `${i ? HEAT_NATS[i - 1] : 0} to ${HEAT_NATS[i]} nats` })), "high loss");

// ---- attention maps

const attention = { choice: new ModelChoice("Model of the attention maps", () => attention.update()), data: null, weights: null, shown: [0, 0] };
$("attention-choice").append(attention.choice.name, attention.choice.step);
attention.list = new TokenList($("attended"), { look: showAttention });
attention.update = latestOnly(async (signal) => {
  const error = $("attention-error");
  try {
    textWithinLimit();
    const data = await (await request("attention", { text: fullText(), ...attention.choice.value }, signal)).json();
    error.hidden = true;
    attention.data = data;
    attention.weights = Uint8Array.from(atob(data.maps), (c) => c.charCodeAt(0));
    if (attention.shown[0] >= data.layers || attention.shown[1] >= data.heads) attention.shown = [0, 0];
    drawMaps();
    attention.list.show(data, { className: () => "" });
    showAttention(data.ids.length - 1);
  } catch (problem) {
    if (problem.name === "AbortError") throw problem;
    error.textContent = problem.message;
    error.hidden = false;
  }
});

// The weights of a query's row, from 0 to 1.
function weightsOf(layer, head, query) {
  const { data, weights } = attention, n = data.ids.length, start = ((layer * data.heads + head) * n + query) * n;
  return Array.from(weights.subarray(start, start + n), (weight) => weight / 255);
}

function drawMaps() {
  const { data } = attention, n = data.ids.length, nodes = [];
  for (let layer = 0; layer < data.layers; layer++) {
    const row = element("div", { className: "layer" }, element("span", { className: "muted", textContent: `layer ${layer + 1}` }));
    for (let head = 0; head < data.heads; head++) {
      const canvas = element("canvas", { width: n, height: n }), context = canvas.getContext("2d"), image = context.createImageData(n, n);
      for (let query = 0; query < n; query++) weightsOf(layer, head, query).forEach((weight, key) => {
        image.data.set([59, 130, 196, 255 * Math.sqrt(weight)], 4 * (query * n + key));  // the root shows small weights too
      });
      context.putImageData(image, 0, 0);
      const button = element("button", { type: "button", className: "map", "aria-label": `layer ${layer + 1}, head ${head + 1}`, "aria-pressed": String(layer === attention.shown[0] && head === attention.shown[1]) }, canvas);
      button.addEventListener("click", () => { attention.shown = [layer, head]; drawMaps(); showAttention(attention.query); });
      row.append(button);
    }
    nodes.push(row);
  }
  $("maps").replaceChildren(...nodes);
}

function showAttention(query) {
  if (!attention.data || query < 0 || query >= attention.list.items.length) return;
  attention.query = query;
  const weights = weightsOf(...attention.shown, query);
  attention.list.items.forEach((item, key) => {
    item.style.background = `color-mix(in srgb, var(--accent) ${(60 * Math.sqrt(weights[key])).toFixed(0)}%, transparent)`;
    item.title = percent(weights[key]);
    item.classList.toggle("echo", key === query);
  });
  const [layer, head] = attention.shown, most = weights.indexOf(Math.max(...weights));
  const label = (index) => drawToken(element("b"), attention.data.token_bytes[index]);
  $("attention-facts").replaceChildren(`Layer ${layer + 1}, head ${head + 1}: `, label(query), ` (framed) attends most to `, label(most), `, with ${percent(weights[most])}.`);
}

// ---- chat

const chat = { choice: new ModelChoice("Model of the chat", () => clearChat()), messages: [], running: null };
$("chat-choice").append(chat.choice.name, chat.choice.step);
function clearChat() {
  chat.running?.abort();
  chat.messages = [];
  $("messages").replaceChildren();
}
$("new-chat").addEventListener("click", () => { clearChat(); $("message").focus(); });

async function say() {
  const content = $("message").value.trim();
  if (!content || chat.running) return;
  $("message").value = "";
  const show = (role, text) => $("messages").appendChild(element("li", { className: role }, document.createTextNode(text))).firstChild;
  const current = chat.running = new AbortController();
  chat.messages.push({ role: "user", content });
  show("user", content);
  const answer = show("assistant live", "");
  let problem = "";
  try {
    await streamed("chat", { messages: chat.messages, ...sampling(), ...chat.choice.value }, current.signal, ({ text, forgotten }) => {
      if (forgotten) chat.messages.splice(0, forgotten);
      if (text) { answer.appendData(text); answer.parentNode.scrollIntoView({ block: "nearest" }); }
    });
  } catch (error) {
    if (error.name !== "AbortError") problem = error.message;
  }
  answer.parentNode.classList.remove("live");
  if (chat.running !== current) return;  // a new conversation was begun
  chat.running = null;
  if (problem) show("error", problem);
  if (answer.data) chat.messages.push({ role: "assistant", content: answer.data.trim() }); else chat.messages.pop();
}
$("say").addEventListener("submit", (e) => { e.preventDefault(); say(); });
$("message").addEventListener("keydown", (e) => { if (e.key === "Enter" && !e.shiftKey) { e.preventDefault(); say(); } });
$("hush").addEventListener("click", () => chat.running?.abort());

