// What the model would say if something were changed: a head switched off, and on the live page
// also a mass, a pull or a distance.

const RANKED = 4; // heads that are listed
const COMPARED = 6; // tokens that are listed before and after
const LIVE_ONLY = "A mass, a pull and a distance can be changed on the live page: chat.py --serve.";

class WhatIf {
  constructor(run, actions) {
    Object.assign(this, { run, actions, changes: new Map(), asked: 0 });
    this.ranking = element("div");
    this.switches = this.#switches();
    this.result = element("div", { className: "result" });
    this.result.setAttribute("aria-live", "polite");
    this.sliders = GIVEN.live ? element("div", { className: "changes" }) : null;
    this.node = element(
      "div",
      { className: "whatif" },
      heading(GIVEN.live ? "What if something were changed?" : "What if a head were switched off?"),
      element(
        "div",
        { className: "sides" },
        element("div", {}, this.switches, ...(this.sliders ? [this.sliders] : []), this.ranking),
        this.result,
      ),
    );
  }

  // A button per head, a row per layer.
  #switches() {
    const { run } = this;
    this.buttons = run.heads.map(({ layer, head }) =>
      element("button", {
        type: "button",
        textContent: `${layer}·${head + 1}`,
        onclick: () => this.#toggle(layer, head),
      }),
    );
    const grid = element(
      "div",
      { className: "switches", style: { "--heads": run.numHeads } },
      ...this.buttons,
    );
    grid.setAttribute("role", "group");
    grid.setAttribute("aria-label", "Heads to switch off");
    return grid;
  }

  // Offline one head at a time: that is what was computed before.
  #toggle(layer, head) {
    const key = `off ${layer} ${head}`;
    const isOn = this.changes.has(key);
    if (!GIVEN.live) this.changes.clear();
    if (isOn) this.changes.delete(key);
    else this.changes.set(key, { kind: "off", layer, head });
    this.#ask();
  }

  #set(key, change) {
    if (change) this.changes.set(key, change);
    else this.changes.delete(key);
    this.#ask();
  }

  update(state) {
    const { run } = this;
    const token = state.token.get(run);
    const layer = Math.max(1, run.layerOf(state.layer));
    const head = state.head === "mean" || state.head >= run.numHeads ? "mean" : state.head;
    const isNewToken = token !== this.token;
    const isNewHead = this.layer !== layer || this.head !== head;
    Object.assign(this, { token, layer, head });
    if (isNewToken) {
      this.changes.delete("mass");
      this.#rank();
    }
    if (isNewToken || isNewHead) {
      const isLess = ["cut", "move"].map((key) => this.changes.delete(key)).some(Boolean);
      if (this.sliders) this.#drawSliders();
      if (isNewToken || isLess) this.#ask();
    }
    const colours = heat();
    this.buttons.forEach((button, n) => {
      const moved = this.moved?.[n] ?? 0;
      button.style.background = heatOf(moved);
      const at = 4 * Math.round(255 * Math.sqrt(moved));
      const light = 0.299 * colours[at] + 0.587 * colours[at + 1] + 0.114 * colours[at + 2];
      button.style.color = light > 140 ? "#14171b" : "#ffffff";
    });
  }

  // Every head by how much of the chance goes to other tokens without it.
  #rank() {
    const { run, token } = this;
    const before = run.next(run.numLayers, token);
    const afters = run.heads.map(({ layer, head }) => run.without(layer, head, token));
    this.moved = afters[0] ? afters.map((after) => movedChance(before, after)) : null;
    this.buttons.forEach((button, n) => {
      const name = `without ${calledHead(run.heads[n])}`;
      button.title = this.moved ? `${name} ${percent(this.moved[n])} of the chance moves` : name;
      button.setAttribute("aria-label", button.title);
    });
    if (!this.moved) {
      this.best = null;
      this.switches.hidden = !GIVEN.live;
      this.ranking.replaceChildren(
        note(
          GIVEN.live
            ? "Press heads to switch them off, layer·head."
            : "This was not computed, as the text is long: make a page of fewer tokens (--num-tokens).",
        ),
      );
      return;
    }
    const order = [...afters.keys()].sort((a, b) => this.moved[b] - this.moved[a]);
    this.best = run.heads[order[0]];
    this.ranking.replaceChildren(
      element(
        "ol",
        { className: "ranked" },
        ...order.slice(0, RANKED).map((n) => {
          const [label, chance] = afters[n][0];
          return element(
            "li",
            {},
            goButton(
              `without ${calledHead(run.heads[n])}`,
              () => this.#choose(run.heads[n]),
              bold(percent(this.moved[n])),
              element("span", { className: "which", textContent: calledHead(run.heads[n]) }),
              context(`→ ${cut(label)} ${percent(chance)}`),
            ),
          );
        }),
      ),
      note(
        `Without one of these heads, at least this share of the chance goes to other tokens. ${GIVEN.live ? "" : LIVE_ONLY}`,
      ),
    );
  }

  #choose({ layer, head }) {
    this.changes.clear();
    this.#toggle(layer, head);
  }

  #drawSliders() {
    const { run, token, layer, head } = this;
    const name = run.labels[token];
    const sources = run.pulls(layer, head, token).filter(([source]) => source !== token);
    const options = () => [
      element("option", { value: "", textContent: "none" }),
      ...sources.map(([source, share]) =>
        element("option", {
          value: source,
          textContent: `${run.labels[source]} ${source} (${percent(share)})`,
        }),
      ),
    ];
    const range = (max, value, step, write, onchange) => {
      const told = element("output", { textContent: write(value) });
      const made = element("input", { type: "range", min: 0, max, step, value });
      made.oninput = () => (told.textContent = write(made.valueAsNumber));
      made.onchange = () => onchange(made.valueAsNumber);
      return [made, told];
    };
    const mass = range(
      4,
      this.changes.get("mass")?.factor ?? 1,
      0.1,
      (x) => `${x} ×`,
      (factor) => this.#set("mass", factor === 1 ? null : { kind: "mass", token, factor }),
    );
    const cutFrom = element("select", {}, ...options());
    cutFrom.onchange = () =>
      this.#set(
        "cut",
        cutFrom.value
          ? {
              kind: "cut",
              layer,
              head: head === "mean" ? null : head,
              token,
              source: Number(cutFrom.value),
            }
          : null,
      );
    const moved = element("select", {}, ...options());
    const nearer = range(
      100,
      50,
      5,
      (x) => `${x} %`,
      () => move(),
    );
    const move = () =>
      this.#set(
        "move",
        moved.value && nearer[0].valueAsNumber
          ? {
              kind: "move",
              token: Number(moved.value),
              toward: token,
              share: nearer[0].valueAsNumber / 100,
            }
          : null,
      );
    moved.onchange = move;
    const who = `${layer}·${head === "mean" ? "all" : head + 1}`;
    const cuts = element("label", {}, `Cut the pull (${who}) of`, cutFrom);
    // dot-product attention has no masses and no places
    this.sliders.replaceChildren(
      ...(run.hasGravity ? [element("label", {}, `Mass of ${name}`, ...mass), cuts] : [cuts]),
      ...(run.hasGravity ? [element("label", {}, "Move nearer", moved, ...nearer)] : []),
    );
  }

  #inWords(change) {
    const { labels } = this.run;
    if (change.kind === "off") return `without ${calledHead(change)}`;
    if (change.kind === "mass")
      return `with ${change.factor} times the mass of ${labels[change.token]}`;
    if (change.kind === "cut")
      return `without the pull of ${labels[change.source]} on ${labels[change.token]}`;
    return `with ${labels[change.token]} ${percent(change.share)} of the way nearer`;
  }

  // Ask for what is chosen; with nothing chosen, the page shows the head that matters most.
  async #ask() {
    const asked = ++this.asked;
    const chosen = [...this.changes.values()];
    const changes =
      chosen.length || !this.best
        ? chosen
        : [{ kind: "off", layer: this.best.layer, head: this.best.head }];
    this.buttons.forEach((button, n) => {
      const { layer, head } = this.run.heads[n];
      const isOff = changes.some((x) => x.kind === "off" && x.layer === layer && x.head === head);
      button.setAttribute("aria-pressed", String(isOff));
    });
    if (!changes.length) return this.result.replaceChildren();
    const { token } = this;
    const waiting = setTimeout(() => {
      if (asked === this.asked) this.result.replaceChildren(note("Computing …"));
    }, 100);
    try {
      const found = await this.actions.whatIf(this.run, changes, token);
      if (asked === this.asked) this.#show(found, changes, token);
    } catch (error) {
      if (asked === this.asked) this.result.replaceChildren(note(String(error?.message ?? error)));
    } finally {
      clearTimeout(waiting);
    }
  }

  #show({ rows, loss, source }, changes, token) {
    const first = (n) => rows.reduce((a, b) => ((b[n] ?? 0) > (a[n] ?? 0) ? b : a));
    const [was, becomes] = [first(1), first(2)];
    const subject = changes.map((change) => this.#inWords(change)).join(", ");
    const sentence =
      was === becomes
        ? [
            `would still say `,
            chip(was[0]),
            ` (${percent(was[2])} in place of ${percent(was[1])}).`,
          ]
        : [
            `would say `,
            chip(becomes[0]),
            ` (${percent(becomes[2])}) instead of `,
            chip(was[0]),
            ` (${percent(was[1])}).`,
          ];
    const most = rows
      .toSorted((a, b) => Math.max(b[1] ?? 0, b[2] ?? 0) - Math.max(a[1] ?? 0, a[2] ?? 0))
      .slice(0, COMPARED);
    // what is not among the likeliest has less than the last of them
    const least = [1, 2].map((n) => Math.min(...rows.map((row) => row[n] ?? 1)));
    const bar = (chance, n) =>
      element("td", {
        ...chanceBar(chance ?? 0),
        textContent: chance === null ? `< ${percent(least[n])}` : percent(chance),
      });
    this.result.replaceChildren(
      element("p", {}, `${subject[0].toUpperCase()}${subject.slice(1)} the model `, ...sentence),
      element(
        "table",
        { className: "chances" },
        element(
          "thead",
          {},
          element(
            "tr",
            {},
            ...["next", "before", "after"].map((textContent) =>
              element("th", { scope: "col", textContent }),
            ),
          ),
        ),
        element(
          "tbody",
          {},
          ...most.map(([label, before, after]) =>
            element(
              "tr",
              {},
              element("th", { scope: "row" }, chip(cut(label))),
              bar(before, 0),
              bar(after, 1),
            ),
          ),
        ),
      ),
      ...(loss ? [element("p", {}, ...this.#lossInWords(loss, token))] : []),
      note(`${source[0].toUpperCase()}${source.slice(1)}.`),
    );
  }

  #lossInWords([before, after], token) {
    const change = after - before;
    const told =
      Math.abs(change) < 0.005
        ? "would surprise it as much"
        : `would surprise it ${change > 0 ? "more" : "less"}`;
    return [
      "What really follows, ",
      chip(this.run.labels[token + 1]),
      `, ${told}: ${number(after)} in place of ${number(before)} nats.`,
    ];
  }
}
