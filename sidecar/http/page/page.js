// Keeps the page up to date, and asks the sidecar for what its buttons say. All texts come from the server, as texts.

import { Drawing } from "./drawing.js";
import { authorized, follow, reasonOf, setToken } from "./stream.js";

const SVG = "http://www.w3.org/2000/svg";
const $ = (id) => document.getElementById(id);
const rates = new Map();
const drawing = new Drawing($("graph"), $("detail"), $("graph-note"), (model) => (rates.has(model) ? ` (${rates.get(model)})` : ""));

// --- rows -------------------------------------------------------------------------------------------------------------

/** A list of rows by key: those that are there change in place, so that whoever stands on a button stays there. */
class Rows {
  constructor(body, template, each = () => {}) {
    this.body = body;
    this.template = template;
    this.each = each;
    this.sorting = null;
  }

  show(rows) {
    const found = new Map([...this.body.children].map((element) => [element.dataset.key, element]));
    for (const row of this.ordered(rows)) {
      const element = found.get(row.key) ?? this.made(row.key);
      found.delete(row.key);
      const cells = element.querySelectorAll("[data-cell]");
      row.cells.forEach((text, place) => {
        if (cells[place].textContent !== text) cells[place].textContent = text;
      });
      if (row.flags) element.className = [...row.flags, element.classList.contains("asked") && "asked"].filter(Boolean).join(" ");
      this.each(element, row);
    }
    for (const element of found.values()) element.remove();
    // To move what has the focus would take it away.
    if (this.body.contains(document.activeElement) && this.body.tagName === "TBODY") return;
    this.ordered(rows).forEach((row, place) => {
      const element = this.elements.get(row.key);
      if (this.body.children[place] !== element) this.body.insertBefore(element, this.body.children[place] ?? null);
    });
  }

  get elements() {
    return new Map([...this.body.children].map((element) => [element.dataset.key, element]));
  }

  made(key) {
    const element = this.template.content.querySelector("[data-key]").cloneNode(true);
    element.dataset.key = key;
    this.body.append(element);
    return element;
  }

  ordered(rows) {
    if (!this.sorting) return rows;
    const { column, sign } = this.sorting;
    const compare = (a, b) => (a < b ? -1 : a > b ? 1 : 0);
    return [...rows].sort((a, b) => sign * compare(a.sort[column], b.sort[column]) || compare(a.key, b.key));
  }
}

const models = new Rows($("model-rows"), $("model-template"), (element, row) => {
  for (const button of element.querySelectorAll("[data-action]")) {
    button.disabled = role !== "operate" || element.classList.contains("asked");
    const label = `${button.textContent} ${row.key}`;
    if (button.getAttribute("aria-label") !== label) button.setAttribute("aria-label", label);
  }
});
const tenants = new Rows($("tenant-rows"), $("tenant-template"));
const moves = new Rows($("moves"), $("move-template"));
const tiers = new Rows($("tiers"), $("tier-template"), (element, row) => {
  const parts = element.querySelector("[data-parts]");
  let x = 0;
  parts.replaceChildren(
    ...row.parts.map(([kind, width]) => {
      const rect = document.createElementNS(SVG, "rect");
      for (const [key, value] of Object.entries({ class: kind, x, width, height: 10 })) rect.setAttribute(key, value);
      x += width;
      return rect;
    }),
  );
  element.querySelector(".all").setAttribute("width", row.budget);
  element.querySelector(".budget").setAttribute("d", `M${row.budget} 0V10`);
});
const tables = { models, tenants };
let role = "";
let state = null;

function showState(found) {
  state = found;
  for (const [key, text] of Object.entries(found.texts)) {
    for (const element of document.querySelectorAll(`[data-text="${key}"]`)) if (element.textContent !== text) element.textContent = text;
  }
  const rateColumn = 4;
  rates.clear();
  for (const row of found.models) rates.set(row.key, row.cells[rateColumn]);
  models.show(found.models);
  tenants.show(found.tenants);
  moves.show(found.moves);
  tiers.show(found.tiers);
  drawing.update(found.runs);
  $("drain").hidden = found.draining;
  $("resume").hidden = !found.draining;
  showStatus(found.draining ? "draining" : "live", found.draining ? "draining" : "live");
  keepFocus();
}

document.addEventListener("click", (event) => {
  const button = event.target.closest("[data-sort]");
  if (!button) return;
  const rows = tables[button.dataset.table];
  const column = Number(button.dataset.sort);
  // Names from a to z, numbers from the largest.
  const first = column ? -1 : 1;
  const sign = rows.sorting?.column === column ? -rows.sorting.sign : first;
  rows.sorting = { column, sign };
  for (const head of button.closest("tr").children) head.setAttribute("aria-sort", "none");
  button.closest("th").setAttribute("aria-sort", sign > 0 ? "ascending" : "descending");
  if (state) rows.show(state[button.dataset.table]);
});

// --- what is going on -------------------------------------------------------------------------------------------------

/** `kind` is live, draining, away, lost or locked. */
function showStatus(kind, told, banner = "") {
  const isBlank = !state && document.body.classList.contains("blank");
  document.body.className = [kind, isBlank && "blank", state && !state.models.length && "empty"].filter(Boolean).join(" ");
  if ($("status").textContent !== told) $("status").textContent = told;
  $("banner").hidden = !banner;
  if ($("banner").textContent !== banner) $("banner").textContent = banner;
  const isOperator = role === "operate" && (kind === "live" || kind === "draining");
  for (const button of [$("drain"), $("resume")]) button.disabled = !isOperator;
}

let toldTimer = 0;
function tell(text, isBad = false) {
  clearTimeout(toldTimer);
  $("told").className = isBad ? "bad" : "";
  $("told").textContent = text;
  $("told").hidden = false;
  toldTimer = setTimeout(() => ($("told").hidden = true), isBad ? 15000 : 5000);
}

// --- buttons ----------------------------------------------------------------------------------------------------------

const ACTIONS = {
  load: ["Load", "Its weights are brought into memory; what is worth least leaves for them."],
  evict: ["Evict", "What no other model uses of it leaves memory. The next request brings it back, and waits for that."],
  pin: ["Pin", "It is loaded, and stays in memory until it is unpinned; others have less room."],
  unpin: ["Unpin", "It may leave memory again when others need the room."],
  drain: ["Drain", "The sidecar takes no new requests, and finishes those it has. Functions go to another sidecar, or wait."],
  resume: ["Resume", "The sidecar takes requests again."],
};

/** Ask whether to go on; resolves to true or false. Escape is no. */
function confirmed(action, whom) {
  const dialog = $("confirm");
  const [word, text] = ACTIONS[action];
  $("confirm-title").textContent = `${word} ${whom}?`;
  $("confirm-text").textContent = text;
  $("confirm-yes").textContent = word;
  return new Promise((decide) => {
    $("confirm-yes").onclick = () => dialog.close("yes");
    $("confirm-no").onclick = () => dialog.close("no");
    dialog.onclose = () => decide(dialog.returnValue === "yes");
    dialog.returnValue = "";
    dialog.showModal();
  });
}

async function post(action, path, whom) {
  const [word] = ACTIONS[action];
  try {
    const response = await fetch(`/admin/v1/${path}`, { method: "POST", headers: authorized({ "Content-Type": "application/json" }), body: "{}" });
    if (response.ok) tell(`${word} ${whom}: done.`);
    else if (response.status === 404 && !path.includes("/")) tell(`${word}: this sidecar has no such route; it is older than this page.`, true);
    else tell(`${word} ${whom}: ${await reasonOf(response, `the sidecar answers ${response.status}.`)}`, true);
  } catch {
    tell(`${word} ${whom}: the sidecar cannot be reached.`, true);
  }
}

$("model-rows").addEventListener("click", async (event) => {
  const button = event.target.closest("[data-action]");
  if (!button) return;
  const row = button.closest("tr");
  const name = row.dataset.key;
  const action = button.dataset.action;
  if (!(await confirmed(action, name))) return;
  row.classList.add("asked");
  await post(action, `models/${encodeURIComponent(name)}/${action}`, name);
  row.classList.remove("asked");
  if (state) models.show(state.models);
  button.focus();
  workedOn = row;
});

/** The button that was used goes with the next state, mostly; whoever works by keyboard goes on in the same row. */
let workedOn = null;
function keepFocus() {
  const at = document.activeElement;
  if (!workedOn || at.checkVisibility() && at !== document.body) return;
  [...workedOn.querySelectorAll("[data-action]")].find((each) => each.checkVisibility() && !each.disabled)?.focus();
}
document.addEventListener("focusin", (event) => {
  if (workedOn && !workedOn.contains(event.target)) workedOn = null;
});

for (const action of ["drain", "resume"]) {
  $(action).addEventListener("click", async () => {
    if (await confirmed(action, "this sidecar")) await post(action, action, "this sidecar");
  });
}

// --- events -----------------------------------------------------------------------------------------------------------

function tokenGiven(message) {
  showStatus("locked", "token needed");
  $("login").hidden = false;
  if (sessionStorage.getItem("trunkline-token")) tell(message, true);
  $("token").focus();
  return new Promise((given) => {
    $("login").onsubmit = (event) => {
      event.preventDefault();
      setToken($("token").value.trim());
      $("token").value = "";
      $("login").hidden = true;
      given();
    };
  });
}

follow("/admin/v1/events", {
  opened: (found) => (role = found),
  refused: tokenGiven,
  lost: (message) => showStatus("lost", "not connected", message),
  event(name, data) {
    if (name === "drawing") drawing.draw(data);
    else if (name === "state") showState(data);
    else if (name === "away") showStatus("away", "engine away", data.message);
  },
});
