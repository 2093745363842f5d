// ---- views

const tabs = [...document.querySelectorAll("[role=tab]")];
let currentTab = "tokens";
function openTab(name) {
  currentTab = name;
  $("composer").hidden = name === "chat";
  for (const tab of tabs) {
    const open = tab.getAttribute("aria-controls") === name;
    tab.setAttribute("aria-selected", open);
    tab.tabIndex = open ? 0 : -1;
    $(tab.getAttribute("aria-controls")).hidden = !open;
  }
  refresh();
}
for (const tab of tabs) {
  tab.addEventListener("click", () => openTab(tab.getAttribute("aria-controls")));
  tab.addEventListener("keydown", (e) => {
    if (e.key !== "ArrowRight" && e.key !== "ArrowLeft") return;
    const shown = tabs.filter((each) => !each.hidden);
    const other = shown.at((shown.indexOf(tab) + (e.key === "ArrowRight" ? 1 : -1)) % shown.length);
    openTab(other.getAttribute("aria-controls"));
    other.focus();
  });
}
let seenText = null;
// A changed text stops a running generation and discards its result.
function resetIfTextChanged() {
  const text = fullText();
  if (text !== seenText) {
    modelPanes.forEach((pane) => pane.reset());
    $("progress").textContent = "";
    $("go").textContent = "Generate";
    $("stop").disabled = true;
  }
  seenText = text;
}
function refresh() {
  resetIfTextChanged();
  if (currentTab === "tokens") panes.forEach((pane) => pane.update());
  else if (about.models.length && currentTab === "attention") attention.update();
  else if (about.models.length && currentTab === "model") modelPanes.forEach((pane) => pane.running || pane.stream.hidden && pane.update());
}

document.addEventListener("keydown", (e) => {
  if (e.key === "Escape") { if (modelPanes.some((pane) => pane.running)) stopGenerating(); else inspect(modelPanes[0], -1); }
  if (e.key === "Enter" && (e.ctrlKey || e.metaKey) && about.models.length) { e.preventDefault(); openTab("model"); generate(); }
});

const themes = ["auto", "light", "dark"];
function setTheme(name) {
  document.documentElement.style.colorScheme = name === "auto" ? "light dark" : name;
  $("theme").textContent = "Theme: " + name;
  try { localStorage.setItem("theme", name); } catch { /* not available in private windows */ }
}
$("theme").addEventListener("click", () => setTheme(themes[(themes.indexOf($("theme").textContent.slice(7)) + 1) % 3]));
try { if (themes.includes(localStorage.getItem("theme"))) setTheme(localStorage.getItem("theme")); } catch { /* as above */ }

async function start() {
  try {
    about = await (await request("about")).json();
  } catch (error) {
    panes[0].error.textContent = error.message;
    panes[0].error.hidden = false;
    return;
  }
  panes.forEach((pane, index) => {
    const options = [...about.tokenizers, ...Object.keys(about.missing)].map((name) => element("option", { value: name, textContent: name + (name in about.missing ? " (how to get it)" : "") }));
    if (index) options.push(element("option", { value: "", textContent: "none" }));
    pane.choice.replaceChildren(...options);
  });
  const names = about.tokenizers;
  panes[1].choice.value = names.includes("GPT-2") && names[0] !== "GPT-2" ? "GPT-2" : names[1] ?? "";
  arrangePanes();
  $("no-model").hidden = Boolean(about.models.length);
  $("with-model").hidden = $("tab-attention").hidden = !about.models.length;
  const talking = about.models.filter((model) => model.chat);
  $("tab-chat").hidden = !talking.length;
  modelPanes[0].choice.fill(about.models);
  modelPanes[1].choice.fill(about.models, { none: true, chosen: about.num_first > 1 ? 1 : -1 });
  attention.choice.fill(about.models);
  chat.choice.fill(talking);
  arrangeModels();
  $("length").max = Math.min(500, about.limits.new_tokens);
  $("samples").max = Math.min(8, about.limits.samples);
  inspect(modelPanes[0], -1);
  if (!box.value) setText(EXAMPLES.Story); else textChanged();
  openTab(tabs.some((tab) => !tab.hidden && location.hash === `#${tab.getAttribute("aria-controls")}`) ? location.hash.slice(1) : "tokens");
}
start();
