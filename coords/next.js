// What would come next: the likeliest tokens, layer by layer, and what changes if something is
// changed.

const LENS = "https://www.lesswrong.com/posts/AcKRB8wDpdaN6v6ru";
const MOST_SURPRISING = 5;

// A surprise in words, by the chance that the token had.
function surpriseInWords(nats) {
  const chance = Math.exp(-nats);
  const words =
    chance > 0.5
      ? "expected"
      : chance > 0.1
        ? "no surprise"
        : chance > 0.01
          ? "a surprise"
          : "a great surprise";
  return `${words}, it had ${percent(chance)} (${number(nats)} nats)`;
}

// At least this share of the chance goes to other tokens: what is not among the five of the other
// list has at most the chance of the last of them.
function movedChance(before, after) {
  const gained = (from, to) => {
    const chances = new Map(from.map(([, chance, id]) => [id, chance]));
    const last = from.at(-1)[1];
    return to.reduce(
      (sum, [, chance, id]) => sum + Math.max(0, chance - (chances.get(id) ?? last)),
      0,
    );
  };
  return Math.max(gained(before, after), gained(after, before));
}

const chanceBar = (share) => ({
  style: { "--share": `${100 * Math.min(1, share)}%` },
  className: "bar",
});

class Next {
  constructor(run, actions) {
    Object.assign(this, { run, actions });
    this.title = element("h2");
    this.sentence = element("p");
    this.likeliest = element("div");
    this.lens = element("div");
    this.whatIf = new WhatIf(run, actions);
    this.strip = new Strip(
      "Surprise of each token, a bar per token",
      (token) => actions.select(run, token),
      (token) => this.#tell(token),
    );
    this.told = element("output", { className: "note" });
    const other = RUNS.find((which) => which !== run);
    // in place of the surprise alone
    this.difference = other ? new LossDifference(run, other, actions) : null;
    this.node = element(
      "section",
      { className: "next" },
      this.title,
      this.sentence,
      ...(this.difference ? [this.difference.node] : [this.strip.canvas, this.told]),
      this.#mostSurprising(),
      element("div", { className: "sides" }, this.likeliest, this.lens),
      this.whatIf.node,
    );
  }

  #mostSurprising() {
    const { run } = this;
    // of equal tokens the one that surprised most
    const found = new Map();
    for (const token of [...run.loss.keys()].sort((a, b) => run.loss[b] - run.loss[a]))
      if (run.loss[token] !== null && !found.has(run.tokens[token]))
        found.set(run.tokens[token], token);
    const most = [...found.values()].slice(0, MOST_SURPRISING);
    const wordOf = (token) => {
      const [first, end] = wordAround(run, token);
      return end - first > 1
        ? `in ${cut(
            run.texts
              .slice(first, end)
              .join("")
              .replace(/^[␣⏎⇥]+/, ""),
          )}, `
        : "";
    };
    return element(
      "p",
      { className: "chosen", hidden: !most.length },
      "Most surprising: ",
      ...most.map((token) =>
        goButton(
          `select position ${token}`,
          () => this.actions.select(run, token),
          chip(run.labels[token]),
          context(`${wordOf(token)}${number(run.loss[token])} nats`),
        ),
      ),
    );
  }

  // About the token under the pointer; null for none.
  #tell(token) {
    const { run } = this;
    this.actions.hover(run, token);
    if (token === null || run.loss[token] === null) {
      this.told.textContent =
        "Above: how much each token of the text surprised the model. Press a bar to go there.";
      return;
    }
    this.told.replaceChildren(
      chip(run.labels[token]),
      ` (${token}): ${surpriseInWords(run.loss[token])}`,
    );
  }

  update(state) {
    const { run } = this;
    const token = state.token.get(run);
    if (this.difference) this.difference.update(state);
    else
      this.strip.draw(
        run.loss.map((nats) => nats ?? 0),
        token,
        40,
      );
    if (token !== this.token) {
      this.token = token;
      this.title.replaceChildren("After ", chip(run.labels[token]), ` (position ${token})`);
      this.#likeliest(token);
      this.#lens(token);
      this.#tell(null);
    }
    this.whatIf.update(state);
  }

  // The real next token: [label, chance, id], or null at the end of the text.
  #real(token) {
    const { run } = this;
    if (token + 1 >= run.count) return null;
    return [run.labels[token + 1], Math.exp(-run.loss[token + 1]), run.tokens[token + 1]];
  }

  #likeliest(token) {
    const { run, actions } = this;
    const rows = run.next(run.numLayers, token);
    const real = this.#real(token);
    const isNamed = real !== null && rows.some(([, , id]) => id === real[2]);
    this.sentence.replaceChildren(
      ...(real === null
        ? ["The text ends here: nothing follows."]
        : ["What follows is ", chip(real[0]), `: ${surpriseInWords(run.loss[token + 1])}.`]),
    );
    const branch = (label, id) =>
      GIVEN.live
        ? goButton(
            `go on with ${label} instead`,
            () => actions.branch(run, token, id, label),
            chip(label),
          )
        : chip(label);
    this.likeliest.replaceChildren(
      heading("Likeliest next"),
      element(
        "table",
        { className: "chances" },
        element(
          "tbody",
          {},
          ...[...rows, ...(real === null || isNamed ? [] : [real])].map(([label, chance, id]) =>
            element(
              "tr",
              { className: real !== null && id === real[2] ? "real" : "" },
              element("th", { scope: "row" }, branch(label, id)),
              element("td", { ...chanceBar(chance), textContent: percent(chance) }),
              element("td", { textContent: real !== null && id === real[2] ? "follows" : "" }),
            ),
          ),
        ),
      ),
      note(
        GIVEN.live
          ? "Press a token to go on with it instead."
          : "To go on with another token, open the page with chat.py --serve.",
      ),
    );
  }

  // From which layer on the first choice stays what it is at the end.
  #formed(token) {
    const { run } = this;
    const first = (layer) => run.next(layer, token)[0];
    let from = run.numLayers;
    while (from > 0 && first(from - 1)[2] === first(run.numLayers)[2]) from--;
    const label = chip(first(run.numLayers)[0]);
    return from === 0
      ? [label, " is the first choice from the embedding on."]
      : [label, ` is the first choice from layer ${from} on.`];
  }

  #lens(token) {
    const { run } = this;
    const real = this.#real(token)?.[2];
    this.lens.replaceChildren(
      heading("Layer by layer"),
      element("p", {}, ...this.#formed(token)),
      element(
        "div",
        { className: "scroller", tabIndex: 0 },
        element(
          "table",
          { className: "lens" },
          element(
            "tbody",
            {},
            ...Array.from({ length: run.numLayers + 1 }, (_, layer) =>
              element(
                "tr",
                {},
                element("th", {
                  scope: "row",
                  textContent: layer ? `layer ${layer}` : "embedding",
                }),
                ...run.next(layer, token).map(([label, chance, id], n) => {
                  const cell = element(
                    "td",
                    { ...chanceBar(chance), title: `${label} ${percent(chance)}` },
                    chip(label),
                    n ? "" : ` ${percent(chance)}`,
                  );
                  cell.classList.toggle("real", id === real);
                  return cell;
                }),
              ),
            ),
          ),
        ),
      ),
      element(
        "p",
        { className: "note" },
        "Each layer's state read as if it were the last: the ",
        element("a", { href: LENS, target: "_blank", rel: "noopener", textContent: "logit lens" }),
        " (nostalgebraist 2020). Outlined: what really follows.",
      ),
    );
  }
}
