// Beside the map: the text, token by token, and the details of the selected token.

const LISTED = 6;
const CONTEXT = 26; // characters, the token's own included

class Side {
  constructor(run, root, actions) {
    Object.assign(this, { run, actions });
    this.details = root.querySelector(".details");
    this.text = root.querySelector(".text");
    this.spoken = root.querySelector(".spoken");
    this.prefix = `text-${RUNS.indexOf(run)}-`;
    this.spans = run.texts.map((text, token) => {
      const span = element(
        "span",
        { id: this.prefix + token, className: "token", dataset: { token } },
        ...tokenText(text),
      );
      // a token that only continues a character is a dot
      span.classList.toggle("part", text === "");
      span.setAttribute("role", "option");
      if (text !== run.labels[token]) span.setAttribute("aria-label", run.labels[token]);
      span.setAttribute("aria-selected", "false");
      return span;
    });
    for (const [token, span] of this.spans.entries()) {
      this.text.append(span);
      if (run.texts[token].endsWith("⏎")) this.text.append(element("br"));
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
    const weights = new Map(pulls);
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
      scrollWithin(this.text, this.spans[selected]);
    }
    this.spoken.textContent =
      selected === undefined
        ? ""
        : spokenToken(
            selected,
            run.mass[selected],
            pulls,
            run.quietOf(state.shown, state.head, selected),
            this.#labelOf,
          );
    this.details.replaceChildren(
      ...(selected === undefined ? this.#overview() : this.#selected(state, selected)),
    );
  }

  #labelOf = (token) => this.run.labels[token];

  // Redrawing the details removes the button that was pressed: the focus moves to the text.
  #choose(token) {
    this.actions.select(this.run, token);
    this.text.focus({ preventScroll: true });
  }

  #go = (token, ...children) =>
    goButton(`select position ${token}`, () => this.#choose(token), ...children);

  // A token after the text before it, to find it there.
  #context(token, room = CONTEXT) {
    const { labels, texts } = this.run;
    let first = token;
    for (
      let left = room - labels[token].length;
      first > 0 && left >= texts[first - 1].length;
      first--
    )
      left -= texts[first - 1].length;
    return element(
      "span",
      { className: "context" },
      first ? "…" : "",
      ...texts.slice(first, token).flatMap(tokenText),
      element("mark", {}, ...tokenText(labels[token])),
    );
  }

  #overview() {
    const { run } = this;
    const places = [...run.labels.keys()];
    const first = new Map(places.toReversed().map((token) => [run.tokens[token], token]));
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
            this.#go(token, chip(run.labels[token]), bold(value(token)), more(token)),
          ),
        ),
      );
    const losses = run.loss.filter((x) => x !== null);
    return [
      heading("Heaviest in this text"),
      list(
        heaviest,
        (token) => number(run.mass[token]),
        (token) => context(plural(run.twins(token).length + 1, "place")),
      ),
      heading("Highest loss"),
      list(
        hardest,
        (token) => number(run.loss[token]),
        (token) => this.#context(token, CONTEXT - run.labels[token].length),
      ),
      note(
        `Loss in nats, of a token given those before it; mean ${number(losses.reduce((a, b) => a + b, 0) / losses.length)}. ` +
          "Select a token here, in the text or on the map to see what pulled it.",
      ),
    ];
  }

  #selected(state, token) {
    const { run } = this;
    return [
      element(
        "div",
        { className: "title" },
        chip(run.labels[token]),
        clearButton(() => this.#choose(null)),
      ),
      facts([
        ["position", String(token)],
        ["mass", number(run.mass[token])],
        ["loss", run.loss[token] === null ? "none" : `${number(run.loss[token])} nats`],
        [run.isCorpus ? "in training" : "in this text", `${plain.format(run.counts[token])} ×`],
      ]),
      ...this.#pulledBy(state, token),
      ...this.#guessed(token),
      ...this.#elsewhere(state, token),
    ];
  }

  #pulledBy(state, token) {
    const { run } = this;
    const layer = run.layerOf(state.shown);
    if (!layer)
      return [
        heading("Nothing has pulled yet"),
        note(
          "Before the first layer, a token is where its embedding puts it. Move to layer 1 to see what pulls it.",
        ),
      ];
    const isMean = state.head === "mean" || state.head >= run.numHeads;
    const who = isMean ? `mean of ${plural(run.numHeads, "head")}` : `head ${state.head + 1}`;
    const pulls = run.pulls(state.shown, state.head, token);
    const quiet = run.quietOf(state.shown, state.head, token);
    return [
      heading(`Pulled in layer ${layer} by (${who})`),
      ...pulledBy(token, pulls, quiet, 1, this.#labelOf, this.#go),
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
      heading("The model's top guesses here"),
      element(
        "p",
        {},
        ...guesses,
        element("br"),
        element(
          "span",
          { className: "note" },
          "predicted from the token before: ",
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
    const title = heading("The same token elsewhere");
    if (!twins.length) return [title, note("Nowhere else in this text.")];
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
      title,
      note(
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
            this.#go(twin, bold(number(far)), this.#context(twin), context(` ${twin}`)),
          ),
        ),
      ),
      ...(shown.length < twins.length
        ? [note(`The ${LISTED} nearest and the ${LISTED} farthest.`)]
        : []),
    ];
  }
}
