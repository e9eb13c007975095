// The view of the heads: layers x heads at a glance, one of them large, and what they learned.

// The table in sentences: which head copies, which looks one token back, which looks farthest.
const answers = (run, measures) => {
  const best = (value) => run.heads.reduce((a, b) => (value(b) > value(a) ? b : a));
  const one = best((row) => row.one_back ?? -1);
  const far = best((row) => row.within ?? -1);
  const reach = best((row) => row.window ?? -1);
  const found = [
    copies(run, measures),
    one.one_back >= 0.1
      ? `Looks one token back: ${calledHead(one)}; ${percent(one.one_back)} of its ${pullWord(run)} comes from there.`
      : `No head looks one token back: at most ${percent(Math.max(0, one.one_back))} of the ${pullWord(run)} comes from there (${calledHead(one)}).`,
    `Looks farthest in this text: ${calledHead(far)}; 90 % of its ${pullWord(run)} comes from within ${plural(far.within ?? 0, "token")}, mean distance ${number(far.mean_distance)}.`,
  ];
  if (run.kind === "newton") {
    found.push(
      run.heads.some((row) => row.window === null)
        ? "Without a cutoff every head feels all earlier tokens."
        : `Could see farthest: ${calledHead(reach)}; its window ends ${plural(reach.window, "token")} back.`,
    );
  }
  return found;
};

function copies(run, measures) {
  if (run.heads.some((row) => !measures.isKnown(row.layer, row.head))) return "Copies: counting …";
  const known = run.heads
    .map((row) => ({ row, seen: measures.seen(row.layer, row.head).copies }))
    .filter(({ seen }) => seen !== null);
  if (!known.length) return "No token occurs again in this text, so no head can be seen to copy.";
  // a head that copies first of all, then by the share
  const [best] = known.sort(
    (a, b) => isMarked(b.seen) - isMarked(a.seen) || b.seen.share - a.seen.share,
  );
  const { share, chance } = best.seen;
  const told = `${calledHead(best.row)}; ${percent(share)} of its ${pullWord(run)} goes to what followed an earlier token like this, where the distance alone would send ${percent(chance)}.`;
  return `${isMarked(best.seen) && share >= 0.1 ? "Copies" : "No head clearly copies; nearest to it"}: ${told}`;
}

// Two runs side by side show the same of their heads.
const headsShown = { mode: "distance", isLarge: false };

class Heads {
  constructor(run, actions) {
    Object.assign(this, { run, actions, curvesOf: "", measures: new Measures(run) });
    this.answers = element("ul", { className: "answers" });
    this.modes = Object.entries(MODES).map(([mode, [textContent]]) =>
      element("button", {
        type: "button",
        textContent,
        dataset: { mode },
        onclick: () => this.#show({ mode, isLarge: false }),
      }),
    );
    this.legend = element("p", { className: "note" });
    this.smalls = run.heads.map((row) => new Small(run, row, () => this.#open(row)));
    // the highest bar of all, of the other run as well
    this.most = Math.max(
      1e-9,
      ...RUNS.flatMap((one) =>
        one.heads.flatMap((row) => binned(profileOf(one, row.layer, row.head))),
      ),
    );
    this.grid = element(
      "div",
      { className: "multiples", style: { "--heads": run.numHeads } },
      ...Array.from({ length: run.numLayers }, (_, layer) =>
        element(
          "div",
          { className: "layer" },
          ...this.smalls.filter(({ row }) => row.layer === layer + 1).map(({ node }) => node),
        ),
      ),
    );
    this.grid.addEventListener("keydown", (event) => this.#onKey(event));
    this.heatmap = new Heatmap(run, actions);
    this.told = element("div", { className: "told" });
    this.large = element("div", { className: "large", hidden: true }, this.heatmap.node, this.told);
    const other = RUNS.find((which) => which !== run);
    // once for both, in the first of them
    this.difference = run === RUNS[0] && other ? new PullDifference(run, other, actions) : null;
    this.field = element("div", { className: "chart" });
    this.pull = element("div", { className: "chart" });
    this.picker = element(
      "select",
      { onchange: () => actions.set({ layer: Number(this.picker.value) }) },
      ...Array.from({ length: run.numLayers }, (_, n) =>
        element("option", { value: n + 1, textContent: `layer ${n + 1}` }),
      ),
    );
    this.table = new HeadTable(run, (row) =>
      run.hasGravity ? actions.showHead(row.layer, row.head) : this.#open(row),
    );
    this.node = element(
      "section",
      { className: "heads" },
      this.answers,
      ...(this.difference ? [this.difference.node] : []),
      element("div", { className: "modes" }, `The ${pullWord(run)}`, ...this.modes),
      this.grid,
      this.large,
      this.legend,
      element(
        "details",
        {},
        element("summary", { textContent: "How the words are found" }),
        note(WORD_RULES),
      ),
      element("label", { className: "picker" }, "Curves of ", this.picker),
      element(
        "div",
        { className: "charts" },
        ...(run.field === null
          ? []
          : [
              figure(
                "Possible field by distance in time (mass 1, same place in space)",
                this.field,
              ),
            ]),
        figure(
          "Measured pull by distance in time (share of all its pull, mean over this text)",
          this.pull,
        ),
      ),
      this.table.node,
    );
  }

  update(state) {
    const { run } = this;
    const [layer, token] = [Math.max(1, run.layerOf(state.layer)), state.token.get(run)];
    const head = state.head === "mean" || state.head >= run.numHeads ? "mean" : state.head;
    Object.assign(this, { state, layer, head, token });
    for (const button of this.modes)
      button.setAttribute(
        "aria-pressed",
        String(!headsShown.isLarge && button.dataset.mode === headsShown.mode),
      );
    this.grid.hidden = headsShown.isLarge;
    this.large.hidden = !headsShown.isLarge;
    this.legend.replaceChildren(
      `${MODES[headsShown.isLarge ? "all" : headsShown.mode][1]} Selected: `,
      chip(run.labels[token]),
      ` (${token}).`,
    );
    this.difference?.update(state);
    if (headsShown.isLarge) this.#drawLarge();
    this.#mark();
    this.#drawCurves();
    this.jobs = this.#jobs();
    this.#work(60);
  }

  hash() {
    return headsShown.mode + (headsShown.isLarge ? "-large" : "");
  }

  restore(text) {
    const [mode, large] = text.split("-");
    if (!Object.hasOwn(MODES, mode)) return;
    Object.assign(headsShown, { mode, isLarge: large === "large" });
    this.update(this.state);
  }

  #show(changed) {
    Object.assign(headsShown, changed);
    this.actions.set({});
  }

  #open({ layer, head }) {
    headsShown.isLarge = true;
    this.actions.set({ layer, head });
    this.large.querySelector("button").focus();
  }

  // The small one that stands for the chosen head is marked, and the one that Tab reaches.
  #mark() {
    const chosen = this.smalls.find(
      ({ row }) => row.layer === this.layer && row.head === this.head,
    );
    for (const small of this.smalls) {
      small.node.tabIndex = -1;
      if (small === chosen) small.node.setAttribute("aria-current", "true");
      else small.node.removeAttribute("aria-current");
    }
    (chosen ?? this.smalls[0]).node.tabIndex = 0;
  }

  #onKey(event) {
    const { numHeads } = this.run;
    const moves = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -numHeads, ArrowDown: numHeads };
    const at = this.smalls.findIndex(({ node }) => node === document.activeElement);
    const next = this.smalls[at + moves[event.key]];
    if (!(event.key in moves) || at < 0) return;
    event.preventDefault();
    event.stopPropagation();
    next?.node.focus();
  }

  // What there is to draw and to count, a small piece at a time.
  *#jobs() {
    this.answers.replaceChildren(
      ...answers(this.run, this.measures).map((textContent) => element("li", { textContent })),
    );
    if (!headsShown.isLarge) {
      const width = this.smalls[0].canvas.clientWidth;
      const room = this.#room(this.grid) / this.run.numLayers - 26;
      const most = headsShown.mode === "all" ? width : 110;
      const height = Math.round(Math.max(26, Math.min(most, room)));
      for (const small of this.smalls) {
        small.draw(headsShown.mode, this.token, width, height, this.most);
        yield;
      }
    }
    for (const small of this.smalls.filter((one) => !one.words.textContent)) {
      small.tell(this.measures.seen(small.row.layer, small.row.head));
      yield;
    }
    this.answers.firstChild.textContent = copies(this.run, this.measures);
    if (headsShown.isLarge) this.#tellLarge();
    if (this.difference) yield* this.difference.jobs();
  }

  // The jobs for so many milliseconds; the rest when the page has had time for other things.
  #work(time) {
    clearTimeout(this.later);
    const end = performance.now() + time;
    while (!this.jobs.next().done) {
      if (performance.now() < end) continue;
      this.later = setTimeout(() => this.#work(30), 0);
      return;
    }
  }

  // The height that is left for a part of the view in the first screen.
  #room(part) {
    const frame = this.node.parentElement;
    const [inside, around] = [part, frame].map((x) => x.getBoundingClientRect());
    const above = inside.top - around.top + frame.scrollTop;
    const high = Math.min(around.height, window.innerHeight - around.top - window.scrollY);
    return Math.max(high, window.innerHeight / 2) - above - 34;
  }

  #drawLarge() {
    const wide = this.large.clientWidth - LEFT;
    const side = Math.min(wide, this.#room(this.large) - BELOW - 24, 620);
    this.heatmap.draw(this.layer, this.head, this.token, Math.floor(Math.max(200, side)));
    this.#tellLarge();
  }

  // Beside the large one: what the head does, and its row of the table.
  #tellLarge() {
    const { run, layer, head } = this;
    const row = run.heads.find((one) => one.layer === layer && one.head === head);
    const press = (textContent, onclick) =>
      element("button", { type: "button", className: "close", textContent, onclick });
    const buttons = [press("All heads", () => this.#show({ isLarge: false }))];
    if (row && run.hasGravity)
      buttons.push(press("Show in orbit", () => this.actions.showHead(layer, head, "orbit")));
    const focused = [...this.told.querySelectorAll("button")].indexOf(document.activeElement);
    this.told.replaceChildren(
      element("p", { className: "modes" }, ...buttons),
      element("h3", { textContent: row ? headName(row) : `layer ${layer} · mean of all heads` }),
      ...(row ? this.#aboutHead(row) : []),
    );
    if (focused >= 0) this.told.querySelectorAll("button")[focused]?.focus();
  }

  #aboutHead(row) {
    const { run } = this;
    const [words, share] = headWords(run, row, this.measures.seen(row.layer, row.head));
    const told = `${words[0].toUpperCase()}${words.slice(1)}${share === null ? "" : `: ${percent(share)} of its ${pullWord(run)}`}.`;
    const late =
      row.retardation >= 0.5 && words.startsWith("copies")
        ? ` Its retardation of ${number(row.retardation, 2)} lets it feel a token at the place of the token before it.`
        : "";
    return [
      element("p", { textContent: told + late }),
      facts(this.table.columns.slice(1).map((column) => [column.title, column.of(row)])),
    ];
  }

  #drawCurves() {
    const { run, layer } = this;
    const key = [layer, this.node.clientWidth, dark.matches].join(" ");
    if (key === this.curvesOf) return;
    this.curvesOf = key;
    this.picker.value = layer;
    const curves = (measured) =>
      measured.of[layer - 1].map((values, head) => ({
        ...headLine(head),
        name: `head ${head + 1}`,
        points: measured.back.map((back, n) => [back, values[n]]),
      }));
    const x = { title: "tokens back (log)", scale: "log1p", write: plain.format };
    if (run.field)
      this.field.replaceChildren(
        lineChart({
          series: curves(run.field),
          x,
          y: { title: "field", low: 0, write: (x) => number(x, 1) },
          label: `Possible field by distance, layer ${layer}`,
          tell: ({ name }, [back, value]) =>
            `${name}: ${number(value)} at ${plain.format(back)} back`,
        }),
      );
    this.pull.replaceChildren(
      lineChart({
        series: curves(run.pull),
        x,
        y: {
          title: "share of the pull (log)",
          scale: "log",
          low: 1e-4,
          high: 1,
          write: (x) => `${100 * x} %`,
        },
        label: `Measured pull by distance, layer ${layer}`,
        tell: ({ name }, [back, value]) =>
          `${name}: ${percent(value)} from ${plain.format(back)} back`,
      }),
    );
  }
}
