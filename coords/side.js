// Beside the map: the text, token by token, and what is known of the selected one.

const LISTED = 6;
const CONTEXT = 26; // characters, of which the last are the token's own

class Side {
  constructor(run, root, actions) {
    Object.assign(this, { run, actions });
    this.details = root.querySelector(".details");
    this.text = root.querySelector(".text");
    this.spoken = root.querySelector(".spoken");
    this.prefix = `text-${RUNS.indexOf(run)}-`;
    this.spans = run.labels.map((label, token) => {
      const span = element(
        "span",
        { id: this.prefix + token, className: "token", dataset: { token } },
        ...tokenText(label),
      );
      span.setAttribute("role", "option");
      span.setAttribute("aria-selected", "false");
      return span;
    });
    for (const [token, span] of this.spans.entries()) {
      this.text.append(span);
      if (run.labels[token].endsWith("⏎")) this.text.append(element("br"));
    }
    this.text.addEventListener("click", (event) => {
      const span = event.target.closest(".token");
      if (span) actions.select(run, Number(span.dataset.token));
    });
    this.text.addEventListener("pointerover", (event) => {
      const span = event.target.closest(".token");
      if (span && event.pointerType !== "touch") actions.hover(run, Number(span.dataset.token));
    });
    this.text.addEventListener("pointerleave", () => actions.hover(run, null));
  }

  update(state) {
    const { run } = this;
    const selected = state.selected?.get(run);
    const { colours } = colouring(run, state.colour);
    const pulls = selected === undefined ? [] : run.pulls(state.shown, state.head, selected);
    const weights = new Map(pulls.map((pull) => [pull.token, pull.weight]));
    const twins = new Set(selected === undefined ? [] : run.twins(selected));
    for (const [token, span] of this.spans.entries()) {
      span.style.setProperty("--own", colours[token]);
      span.style.setProperty(
        "--pull",
        weights.has(token) ? `${Math.round(18 + 62 * Math.sqrt(weights.get(token)))}%` : "0%",
      );
      span.classList.toggle("source", weights.has(token));
      span.classList.toggle("twin", twins.has(token));
      span.setAttribute("aria-selected", String(token === selected));
    }
    if (selected === undefined) this.text.removeAttribute("aria-activedescendant");
    else {
      this.text.setAttribute("aria-activedescendant", this.prefix + selected);
      this.#scrollTo(this.spans[selected]);
    }
    this.spoken.textContent =
      selected === undefined
        ? ""
        : [
            `${run.labels[selected]}, position ${selected}, mass ${number(run.mass[selected])}`,
            ...pulls
              .slice(0, 3)
              .map((pull) => `pulled ${percent(pull.weight)} by ${run.labels[pull.token]}`),
          ].join(", ");
    this.details.replaceChildren(
      ...(selected === undefined ? this.#overview() : this.#selected(state, selected)),
    );
  }

  // The text alone scrolls: scrollIntoView would move the page too.
  #scrollTo(span) {
    const top = span.offsetTop - this.text.offsetTop;
    const { scrollTop, clientHeight } = this.text;
    if (top < scrollTop || top > scrollTop + clientHeight - 30)
      this.text.scrollTop = top - clientHeight / 2;
  }

  // The button that was pressed goes away with what it stood in: the keyboard goes on in the text.
  #choose(token) {
    this.actions.select(this.run, token);
    this.text.focus({ preventScroll: true });
  }

  #go(token, ...children) {
    const button = element(
      "button",
      { className: "go", type: "button", onclick: () => this.#choose(token) },
      ...children,
    );
    button.title = `select position ${token}`;
    return button;
  }

  // What came before a token, for those who look for it in the text.
  #context(token, room = CONTEXT) {
    const { labels } = this.run;
    let first = token;
    for (
      let left = room - labels[token].length;
      first > 0 && left >= labels[first - 1].length;
      first--
    )
      left -= labels[first - 1].length;
    return element(
      "span",
      { className: "context" },
      first ? "…" : "",
      ...labels.slice(first, token).flatMap(tokenText),
      element("mark", {}, ...tokenText(labels[token])),
    );
  }

  #overview() {
    const { run } = this;
    const places = [...run.labels.keys()];
    const first = new Map(places.toReversed().map((token) => [run.labels[token], token]));
    const heaviest = [...first.values()].sort((a, b) => run.mass[b] - run.mass[a]).slice(0, LISTED);
    const hardest = places
      .slice(1)
      .sort((a, b) => run.loss[b] - run.loss[a])
      .slice(0, LISTED);
    const list = (tokens, value, more) =>
      element(
        "ol",
        { className: "ranked" },
        ...tokens.map((token) =>
          element(
            "li",
            {},
            this.#go(
              token,
              chip(run.labels[token]),
              element("b", { textContent: value(token) }),
              ...more(token),
            ),
          ),
        ),
      );
    const losses = run.loss.filter((x) => x !== null);
    return [
      element("h3", { textContent: "Heaviest in this text" }),
      list(
        heaviest,
        (token) => number(run.mass[token]),
        (token) => [
          element("span", {
            className: "context",
            textContent: plural(run.twins(token).length + 1, "place"),
          }),
        ],
      ),
      element("h3", { textContent: "Highest loss" }),
      list(
        hardest,
        (token) => number(run.loss[token]),
        (token) => [this.#context(token, CONTEXT - run.labels[token].length)],
      ),
      element("p", {
        className: "note",
        textContent:
          `Loss in nats, of a token given those before it; mean ${number(losses.reduce((a, b) => a + b, 0) / losses.length)}. ` +
          "Select a token here, in the text or on the map to see what pulled it.",
      }),
    ];
  }

  #selected(state, token) {
    const { run } = this;
    const close = element("button", {
      className: "close",
      type: "button",
      textContent: "Clear",
      onclick: () => this.#choose(null),
    });
    const fact = (name, value) =>
      element(
        "div",
        {},
        element("dt", { textContent: name }),
        element("dd", { textContent: value }),
      );
    return [
      element("div", { className: "title" }, chip(run.labels[token]), close),
      element(
        "dl",
        { className: "facts" },
        fact("position", String(token)),
        fact("mass", number(run.mass[token])),
        fact("loss", run.loss[token] === null ? "none" : `${number(run.loss[token])} nats`),
        fact(run.isCorpus ? "in training" : "in this text", `${plain.format(run.counts[token])} ×`),
      ),
      ...this.#pulledBy(state, token),
      ...this.#guessed(token),
      ...this.#elsewhere(state, token),
    ];
  }

  #pulledBy(state, token) {
    const { run } = this;
    const block = run.layerOf(state.shown);
    const isMean = state.head === "mean" || state.head >= run.numHeads;
    const who = isMean ? `mean of ${plural(run.numHeads, "head")}` : `head ${state.head + 1}`;
    const heading = element("h3", {
      textContent: block ? `Pulled in block ${block} by (${who})` : "Nothing has pulled yet",
    });
    if (!block)
      return [
        heading,
        element("p", {
          className: "note",
          textContent:
            "At layer 0 a token is where its embedding puts it. Move to layer 1 to see what pulls.",
        }),
      ];
    const pulls = run.pulls(state.shown, state.head, token);
    if (!pulls.length)
      return [heading, element("p", { className: "note", textContent: "Nothing reaches it." })];
    const strongest = pulls[0].weight;
    const rest = 1 - pulls.reduce((sum, pull) => sum + pull.weight, 0);
    return [
      heading,
      element(
        "ol",
        { className: "pulls" },
        ...pulls.map((pull) =>
          element(
            "li",
            { style: { "--share": `${(100 * pull.weight) / strongest}%` } },
            this.#go(
              pull.token,
              chip(run.labels[pull.token]),
              element("b", { textContent: percent(pull.weight) }),
              element("span", {
                className: "context",
                textContent:
                  pull.token === token ? "itself" : `${plain.format(token - pull.token)} back`,
              }),
            ),
          ),
        ),
      ),
      element("p", {
        className: "note",
        textContent:
          rest > 0.0005 ? `All others together ${percent(rest)}.` : "There are no others.",
      }),
    ];
  }

  #guessed(token) {
    const { run } = this;
    if (!token) return [];
    const guesses = run.guesses[token].flatMap((guess, n) => [
      n ? ", " : "",
      chip(guess),
      ` ${percent(run.chances[token][n])}`,
    ]);
    return [
      element("h3", { textContent: "In its place the model expected" }),
      element(
        "p",
        {},
        ...guesses,
        element("br"),
        element(
          "span",
          { className: "note" },
          "as foreseen from the token before: ",
          this.#go(token - 1, chip(run.labels[token - 1]), "what pulled that"),
        ),
      ),
    ];
  }

  #elsewhere(state, token) {
    const { run } = this;
    const twins = run
      .twins(token)
      .map((twin) => [twin, run.distance(state.shown, token, twin)])
      .sort((a, b) => a[1] - b[1]);
    const heading = element("h3", { textContent: "The same token elsewhere" });
    if (!twins.length)
      return [
        heading,
        element("p", { className: "note", textContent: "Nowhere else in this text." }),
      ];
    const all = run.labels
      .map((_, other) => run.distance(state.shown, token, other))
      .filter((_, other) => other !== token)
      .sort((a, b) => a - b);
    const typical = all[Math.floor(all.length / 2)];
    const layers = Array.from(
      { length: run.numLayers + 1 },
      (_, layer) =>
        twins.reduce((sum, [twin]) => sum + run.distance(layer, token, twin), 0) / twins.length,
    );
    const shown =
      twins.length > 2 * LISTED ? [...twins.slice(0, LISTED), ...twins.slice(-LISTED)] : twins;
    return [
      heading,
      element(
        "p",
        { className: "note" },
        `${plural(twins.length, "other place")}. Distance in z space after layer ${run.layerOf(state.shown)}: mean ${number(layers[run.layerOf(state.shown)])}, ` +
          `to any other token typically ${number(typical)}. Mean by layer: ${layers.map((far) => number(far)).join(" → ")}.`,
      ),
      element(
        "ul",
        { className: "twins" },
        ...shown.map(([twin, far]) =>
          element(
            "li",
            {},
            this.#go(
              twin,
              element("b", { textContent: number(far) }),
              this.#context(twin),
              element("span", { className: "context", textContent: ` ${twin}` }),
            ),
          ),
        ),
      ),
      ...(shown.length < twins.length
        ? [
            element("p", {
              className: "note",
              textContent: `The ${LISTED} nearest and the ${LISTED} farthest.`,
            }),
          ]
        : []),
    ];
  }
}
