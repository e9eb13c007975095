// What there is to know about the selected token: its facts, what pulled it, what was expected.

const LISTED = 6;
const CONTEXT = 26; // characters, the token's own included

class Details {
  constructor(run, actions) {
    Object.assign(this, { run, actions, open: new Set() });
    this.node = element("div", { className: "details", tabIndex: 0 });
    this.node.setAttribute("role", "region");
    this.node.setAttribute("aria-label", "About the selected token");
  }

  update(state) {
    const { run } = this;
    const [token, layer] = [state.token.get(run), run.layerOf(state.layer)];
    const head = shownHead(state, run);
    if (this.drawn === `${token} ${layer} ${head}`) return;
    this.drawn = `${token} ${layer} ${head}`;
    const hadFocus = this.node.contains(document.activeElement);
    this.node.replaceChildren(
      this.#title(token),
      facts([
        ["position", plain.format(token)],
        ...(run.mass ? [["mass", number(run.mass[token])]] : []),
        ["surprise", token ? `${number(run.loss[token])} nats` : "none"],
        [run.isCorpus ? "in training" : "in this text", `${plain.format(run.counts[token])} ×`],
      ]),
      ...this.#pulledBy(layer, head, token),
      ...this.#expected(token),
      this.#folded("The same token elsewhere", () => this.#elsewhere(layer, token)),
      ...(run.mass ? [this.#folded("Heaviest in this text", () => this.#heaviest())] : []),
      this.#folded("Most surprising in this text", () => this.#hardest()),
    );
    this.node.scrollTop = 0;
    // the button that was pressed is gone
    if (hadFocus) this.node.focus({ preventScroll: true });
  }

  #go = (token, ...children) =>
    goButton(`select position ${token}`, () => this.actions.select(this.run, token), ...children);

  #title(token) {
    const { labels, texts } = this.run;
    const [first, end] = wordAround(this.run, token);
    const word = texts.slice(first, end).join("");
    return element(
      "div",
      { className: "title" },
      chip(labels[token]),
      ...(end - first > 1 ? [context(`in ${cut(word.replace(/^[␣⏎⇥]+/, ""))}`)] : []),
    );
  }

  // A list that opens at a click; it stays open when another token is selected.
  #folded(title, fill) {
    const box = element("details", {}, element("summary", { textContent: title }));
    const show = () => box.childElementCount < 2 && box.append(...fill());
    if (this.open.has(title)) {
      box.open = true;
      show();
    }
    box.addEventListener("toggle", () => {
      this.open[box.open ? "add" : "delete"](title);
      if (box.open) show();
    });
    return box;
  }

  #pulledBy(layer, head, token) {
    const { run } = this;
    if (!layer)
      return [
        heading("Nothing has pulled yet"),
        note("Before the first layer, a token is where its embedding puts it. Go to layer 1."),
      ];
    const who = head === "mean" ? `mean of ${plural(run.numHeads, "head")}` : `head ${head + 1}`;
    const pulls = run.pulls(layer, head, token, LISTED);
    const whole = run.shares(layer, head, token).reduce((sum, share) => sum + share, 0);
    return [
      heading(`${run.hasGravity ? "Pulled" : "Attention"} in layer ${layer}, ${who}`),
      ...pulledBy(
        token,
        pulls,
        run.quietOf(layer, head, token),
        whole,
        (source) => run.labels[source],
        this.#go,
        run.hasGravity ? BACKGROUND : "the share of the sink, which stands for no token",
      ),
    ];
  }

  // What the model expected at this place, and how likely what came was.
  #expected(token) {
    const { run, actions } = this;
    if (!token) return [note("The first token: nothing comes before it, so nothing was expected.")];
    const chance = Math.exp(-run.loss[token]);
    const expected = run.next(run.numLayers, token - 1);
    const rows = expected.map(([label, chance, id]) => [label, chance, id]);
    if (!rows.some(([, , id]) => id === run.tokens[token]))
      rows.push([run.labels[token], chance, run.tokens[token]]);
    const row = ([label, chance, id]) => {
      const came = id === run.tokens[token];
      const parts = [
        chip(label),
        bold(percent(chance)),
        context(came ? "what came" : GIVEN.live ? "continue with this" : ""),
      ];
      const branch = () => actions.branch(run, token - 1, id, label);
      return element(
        "li",
        { style: { "--share": `${100 * Math.min(1, chance / rows[0][1])}%` } },
        GIVEN.live && !came
          ? goButton("write this here instead, and let the model go on", branch, ...parts)
          : element("span", { className: "go" }, ...parts),
      );
    };
    return [
      heading("Expected here"),
      element("ol", { className: "pulls expected" }, ...rows.map(row)),
    ];
  }

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

  #list(tokens, value, more) {
    const item = (token) =>
      element(
        "li",
        {},
        this.#go(token, chip(this.run.labels[token]), bold(value(token)), more(token)),
      );
    return element("ol", { className: "ranked" }, ...tokens.map(item));
  }

  #heaviest() {
    const { run } = this;
    const first = new Map(run.tokens.map((id, token) => [id, token]).toReversed());
    const heaviest = [...first.values()].sort((a, b) => run.mass[b] - run.mass[a]);
    return [
      this.#list(
        heaviest.slice(0, LISTED),
        (token) => number(run.mass[token]),
        (token) => context(plural(run.twins(token).length + 1, "place")),
      ),
    ];
  }

  #hardest() {
    const { run } = this;
    const losses = run.loss.slice(1);
    const mean = losses.reduce((sum, loss) => sum + loss, 0) / losses.length;
    return [
      this.#list(
        [...losses.keys()]
          .map((n) => n + 1)
          .sort((a, b) => run.loss[b] - run.loss[a])
          .slice(0, LISTED),
        (token) => number(run.loss[token]),
        (token) => this.#context(token, CONTEXT - run.labels[token].length),
      ),
      note(
        losses.length
          ? `Surprise is the loss in nats, of a token given those before it; mean ${number(mean)}.`
          : "One token alone surprises nobody: nothing comes before it.",
      ),
    ];
  }

  #elsewhere(layer, token) {
    const { run } = this;
    const twins = nearestTwins(run, layer, token);
    if (!twins.length) return [note("Nowhere else in this text.")];
    const shown =
      twins.length > 2 * LISTED ? [...twins.slice(0, LISTED), ...twins.slice(-LISTED)] : twins;
    const told = run.z ? this.#distances(layer, token, twins) : "The numbers are tokens between.";
    const item = ([twin, far]) =>
      element(
        "li",
        {},
        this.#go(twin, bold(number(far)), this.#context(twin), context(` ${twin}`)),
      );
    return [
      note(`${plural(twins.length, "other place")}. ${told}`),
      element("ul", { className: "twins" }, ...shown.map(item)),
      ...(shown.length < twins.length
        ? [note(`The ${LISTED} nearest and the ${LISTED} farthest.`)]
        : []),
    ];
  }

  #distances(layer, token, twins) {
    const { run } = this;
    const mean = (layer) =>
      twins.reduce((sum, [twin]) => sum + run.distance(layer, token, twin), 0) / twins.length;
    const all = run.labels
      .map((_, other) => run.distance(layer, token, other))
      .filter((_, other) => other !== token)
      .sort((a, b) => a - b);
    const layers = Array.from({ length: run.numLayers + 1 }, (_, layer) => number(mean(layer)));
    return (
      `Distance in z space after layer ${layer}: mean ${number(mean(layer))}, ` +
      `to any other token typically ${number(all[Math.floor(all.length / 2)])}. ` +
      `Mean by layer: ${layers.join(" → ")}.`
    );
  }
}
