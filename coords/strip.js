// Under the orbit: a button for each head of each layer, and what colour, size and lines mean.

// A head's button shows of its pull on the token: the strongest source's share, that of the others,
// and what is quiet.
class HeadStrip {
  constructor(run, actions) {
    Object.assign(this, { run, actions });
    this.hasQuiet = run.quietOf(1, 0, 0) !== null;
    const numbers = Array.from({ length: run.numHeads }, (_, head) => head);
    const row = (n) =>
      numbers.map((head) => {
        const button = element("button", {
          type: "button",
          tabIndex: -1,
          onclick: () => this.#choose(n + 1, head),
        });
        button.setAttribute("aria-pressed", "false");
        return button;
      });
    this.rows = Array.from({ length: run.numLayers }, (_, n) => row(n));
    const small = (textContent) => element("span", { textContent });
    this.grid = element(
      "div",
      { className: "strip-grid", style: { "--heads": run.numHeads } },
      small("head"),
      ...numbers.map((head) => small(head + 1)),
      ...this.rows.flatMap((row, n) => [small(`layer ${n + 1}`), ...row]),
    );
    this.grid.setAttribute("role", "group");
    this.grid.setAttribute("aria-label", "All heads: choose one");
    this.grid.addEventListener("keydown", (event) => this.#move(event));
    const part = (name, text) =>
      element("span", { className: name }, element("i"), ` ${text}`);
    this.node = element(
      "div",
      { className: "strip" },
      this.grid,
      element(
        "p",
        { className: "strip-key" },
        part("most", "strongest source"),
        part("rest", "others"),
        ...(this.hasQuiet ? [part("still", "quiet")] : []),
      ),
    );
  }

  #choose(layer, head) {
    this.actions.set({ layer, head }, this.run);
  }

  #move(event) {
    const steps = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] };
    if (!steps[event.key]) return;
    event.preventDefault();
    event.stopPropagation(); // elsewhere in the page arrows choose a token or a layer
    const [down, across] = steps[event.key];
    const layer = clamped(this.layer + down, 1, this.run.numLayers);
    const head = clamped(this.head + across, 0, this.run.numHeads - 1);
    this.#choose(layer, head);
    this.rows[layer - 1][head].focus();
  }

  // Marks the chosen head at once; the bars of all heads follow when the picture has been painted.
  update(layer, head, token) {
    const marked = this.marked;
    if (marked) {
      marked.setAttribute("aria-pressed", "false");
      marked.tabIndex = -1;
    }
    this.marked = this.rows[layer - 1][head];
    this.marked.setAttribute("aria-pressed", "true");
    this.marked.tabIndex = 0;
    Object.assign(this, { layer, head });
    if (this.token === token) return;
    this.token = token;
    cancelAnimationFrame(this.frame);
    clearTimeout(this.waiting);
    this.frame = requestAnimationFrame(() => {
      this.waiting = setTimeout(() => this.#measure(), 0);
    });
  }

  #measure() {
    const { run, token } = this;
    this.rows.forEach((row, n) =>
      row.forEach((button, head) => {
        const shares = run.shares(n + 1, head, token);
        const sum = shares.reduce((a, b) => a + b, 0);
        const best = shares.reduce((best, share, at) => (share > shares[best] ? at : best), 0);
        const quiet = this.hasQuiet ? `, quiet ${percent(Math.max(0, 1 - sum))}` : "";
        button.style.setProperty("--most", `${(100 * shares[best]).toFixed(1)}%`);
        button.style.setProperty("--rest", `${(100 * sum).toFixed(1)}%`);
        const pulls = `${run.labels[best]} pulls ${percent(shares[best])}`;
        button.title = `layer ${n + 1}, head ${head + 1}: ${pulls}${quiet}`;
        button.setAttribute("aria-label", button.title);
      }),
    );
  }
}

// What colour, size and lines mean, and the choice of how to split distance into space and time.
class OrbitKey {
  constructor(run, actions) {
    const { low, high, size } = massScale();
    const dot = (mass) =>
      element("i", { className: "dot", style: { "--size": 2 * size(mass) } });
    const choice = (value, text) => {
      const input = element("input", {
        type: "radio",
        name: `split-${RUNS.indexOf(run)}`,
        value,
        onchange: () => actions.set({ split: value }),
      });
      return [input, element("label", {}, input, text)];
    };
    const [[colour, asColour], [axes, asAxes]] = [
      choice("colour", "as colour"),
      choice("axes", "as two axes"),
    ];
    this.inputs = { colour, axes };
    const words = (...parts) => element("span", {}, ...parts);
    this.sample = element("span", { className: "sample" });
    const split = element(
      "span",
      { className: "split" },
      "space and time",
      asColour,
      asAxes,
    );
    split.setAttribute("role", "radiogroup");
    split.setAttribute("aria-label", "Show space and time");
    this.node = element(
      "div",
      { className: "orbit-key" },
      ...(run.kind === "published"
        ? []
        : [
            split,
            words("far in space ", element("i", { className: "lateness" }), " far in time"),
          ]),
      words(`mass ${number(low, 2)} `, dot(low), dot(1), dot(high), ` ${number(high, 2)}`),
      words("wider line: larger share"),
      this.sample,
    );
  }

  // `unit`: the radius of mass 1 in the picture.
  update(split, unit, numDrawn, numSources) {
    this.node.style.setProperty("--unit", `${unit}px`);
    this.inputs[split].checked = true;
    const [strong, all, others] = [MOST_DOTS / 2, numSources, numDrawn - MOST_DOTS / 2].map((x) =>
      plain.format(x),
    );
    this.sample.textContent =
      numDrawn < numSources
        ? `Drawn: the ${strong} strongest of ${all} sources, and ${others} of the others.`
        : "";
  }
}
