// The fused graph: elements for what the server has laid out, what of it is where, and one block at a time to look at.

const SVG = "http://www.w3.org/2000/svg";
const MOST_NAMED = 24;

function make(name, attributes, parent) {
  const element = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  parent.append(element);
  return element;
}

export class Drawing {
  /** `box` has the svg and the list of lanes; `detail` says what is pointed at; `rateOf(model)` is how often one is asked. */
  constructor(box, detail, note, rateOf) {
    this.svg = box.querySelector("svg");
    this.lanes = box.querySelector("ol");
    this.detail = detail;
    this.note = note;
    this.rateOf = rateOf;
    this.drawn = null;
    this.now = null;
    this.groups = [];
    this.looked = -1;
    // Not at the svg: one that listens for the focus is a stop of its own for some browsers.
    box.addEventListener("pointerover", (event) => this.look(this.placeOf(event.target)));
    box.addEventListener("focusin", (event) => this.look(this.placeOf(event.target)));
    box.addEventListener("pointerleave", () => this.look(this.placeOf(document.activeElement)));
    box.addEventListener("focusout", () => this.look(-1));
    box.addEventListener("keydown", (event) => this.step(event));
  }

  /** Draw anew what models there are. */
  draw(drawn) {
    this.drawn = drawn;
    this.svg.setAttribute("viewBox", `0 0 1000 ${Math.max(drawn.height, 1)}`);
    this.svg.setAttribute("height", drawn.height);
    this.svg.replaceChildren();
    const bands = make("g", { class: "bands" }, this.svg);
    for (const d of drawn.bands) make("path", { d }, bands);
    const runs = make("g", { class: "runs" }, this.svg);
    this.groups = drawn.runs.map((run, place) => {
      const group = make("g", { class: "run", tabindex: place ? -1 : 0, role: "img", "data-place": place }, runs);
      for (const kind of ["disk", "host", "device"]) {
        make("rect", { class: kind, x: run.x, y: run.y, width: kind === "disk" ? run.w : 0, height: run.h }, group);
      }
      return group;
    });
    this.lanes.className = `lanes row-${drawn.row}`;
    this.lanes.replaceChildren(
      ...drawn.lanes.map((lane) => {
        const item = document.createElement("li");
        item.textContent = lane.name;
        item.title = lane.name;
        return item;
      }),
    );
    this.note.textContent = drawn.note;
    this.look(-1);
  }

  /** Show how much of each block is where. */
  update(now) {
    if (!this.drawn || now.version !== this.drawn.version) return;
    this.now = now;
    this.drawn.runs.forEach((run, place) => {
      const group = this.groups[place];
      const [, host, device] = group.children;
      const isBare = now.resident[place] === null;
      const flag = now.flags[place];
      const words = ["run", isBare && "bare", flag & 1 && "used", flag & 2 && "pinned", run.lanes > 1 && "shared"];
      group.setAttribute("class", words.filter(Boolean).join(" "));
      device.setAttribute("width", (run.w * (now.resident[place] ?? 0)) / 100);
      host.setAttribute("width", (run.w * now.host[place]) / 100);
      group.setAttribute("aria-label", `${run.about}. ${this.where(place)}. ${this.who(run)}`);
    });
    this.look(this.looked);
  }

  placeOf(target) {
    const group = target.closest?.("[data-place]");
    return group ? Number(group.dataset.place) : -1;
  }

  names(run) {
    return this.drawn.lanes.slice(run.first, run.first + run.lanes).map((lane) => lane.name);
  }

  who(run) {
    const names = this.names(run);
    const more = names.length > MOST_NAMED ? ` and ${names.length - MOST_NAMED} more` : "";
    return names.slice(0, MOST_NAMED).map((name) => `${name}${this.rateOf(name)}`).join(", ") + more;
  }

  where(place) {
    if (!this.now) return "";
    const { resident, host, flags } = this.now;
    const told = [];
    if (resident[place] === null) told.push("no weights");
    else if (resident[place]) told.push(resident[place] === 100 ? "in memory" : `${resident[place]} % in memory`);
    else told.push("on disk");
    if (host[place]) told.push(`${host[place]} % in host memory`);
    if (flags[place] & 1) told.push("in use");
    if (flags[place] & 2) told.push("pinned");
    return told.join(", ");
  }

  /** Say what a block is, who runs through it, and where it is. */
  look(place) {
    this.looked = place;
    const run = this.drawn?.runs[place];
    this.groups.forEach((group, each) => group.classList.toggle("looked", each === place));
    [...this.lanes.children].forEach((item, lane) => {
      item.classList.toggle("through", Boolean(run) && lane >= run.first && lane < run.first + run.lanes);
    });
    if (!run) return;
    const share = document.createElement("b");
    share.textContent = run.lanes > 1 ? `shared by ${run.lanes}` : "one model";
    this.detail.replaceChildren(share, ` · ${run.about} · ${this.where(place)} — ${this.who(run)}`);
  }

  /** Go to another block with an arrow key: right to what follows, left back, up and down to the nearest. */
  step(event) {
    const from = this.placeOf(event.target);
    const runs = this.drawn?.runs ?? [];
    if (from < 0) return;
    const here = runs[from];
    const middle = (run) => run.y + run.h / 2;
    const nearest = (ahead) => {
      let best = -1;
      const far = (run) => Math.abs(run.x + run.w / 2 - here.x - here.w / 2) / 8 + Math.abs(middle(run) - middle(here));
      runs.forEach((run, place) => {
        const isAhead = ahead * (middle(run) - middle(here)) > 0.5;
        if (isAhead && (best < 0 || far(run) < far(runs[best]))) best = place;
      });
      return best;
    };
    const to = {
      ArrowRight: () => runs.findIndex((run) => run.parent === from),
      ArrowLeft: () => here.parent ?? -1,
      ArrowDown: () => nearest(1),
      ArrowUp: () => nearest(-1),
    }[event.key]?.();
    if (to === undefined) return;
    event.preventDefault();
    if (to < 0) return;
    this.groups[from].setAttribute("tabindex", -1);
    this.groups[to].setAttribute("tabindex", 0);
    this.groups[to].focus();
  }
}
