// What would come next: the likeliest tokens, layer by layer, and what changes if something is
// changed.

const LENS = "https://www.lesswrong.com/posts/AcKRB8wDpdaN6v6ru";
const MOST_SURPRISING = 6;

// A surprise in words: its chance as one in so many.
function surpriseInWords(nats) {
  const oneIn = Math.exp(nats);
  const words = oneIn < 2 ? "expected" : oneIn < 10 ? "no surprise" : oneIn < 100 ? "a surprise" : "a great surprise";
  return oneIn < 2 ? words : `${words}, one in ${number(oneIn, 2)}`;
}

// At least this share of the chance goes to other tokens: what is not among the five of the other
// list has at most the chance of the last of them.
function movedChance(before, after) {
  const gained = (from, to) => {
    const chances = new Map(from.map(([, chance, id]) => [id, chance]));
    const last = from.at(-1)[1];
    return to.reduce((sum, [, chance, id]) => sum + Math.max(0, chance - (chances.get(id) ?? last)), 0);
  };
  return Math.max(gained(before, after), gained(after, before));
}

const chanceBar = (share) => ({ style: { "--share": `${100 * Math.min(1, share)}%` }, className: "bar" });

class Next {
  constructor(run, actions) {
    Object.assign(this, { run, actions });
    this.title = element("h2");
    this.sentence = element("p");
    this.likeliest = element("div");
    this.lens = element("div");
    this.whatIf = new WhatIf(run, actions);
    this.text = this.#text();
    const other = RUNS.find((which) => which !== run);
    // once for both, in the first of them
    this.difference = run === RUNS[0] && other ? new LossDifference(run, other, actions) : null;
    this.node = element(
      "section",
      { className: "next" },
      this.text,
      this.#mostSurprising(),
      this.title,
      this.sentence,
      element("div", { className: "sides" }, this.likeliest, this.lens),
      this.whatIf.node,
      ...(this.difference ? [this.difference.node] : []),
    );
  }

  #mostSurprising() {
    const { run } = this;
    const most = [...run.loss.keys()]
      .filter((token) => run.loss[token] !== null)
      .sort((a, b) => run.loss[b] - run.loss[a])
      .slice(0, MOST_SURPRISING);
    return element(
      "p",
      { className: "chosen" },
      "Most surprising: ",
      ...most.map((token) =>
        goButton(
          `select position ${token}`,
          () => this.actions.select(run, token),
          chip(run.labels[token]),
          context(`${number(run.loss[token], 2)} nats`),
        ),
      ),
    );
  }

  // The whole text, the more surprising a token the darker.
  #text() {
    const { run } = this;
    const most = Math.max(...run.loss);
    this.spans = run.texts.map((text, token) => {
      const nats = run.loss[token];
      const told = nats === null ? "the first token" : `${number(nats)} nats, ${surpriseInWords(nats)}`;
      return element(
        "span",
        {
          className: "token",
          title: `${run.labels[token]} (${token}): ${told}`,
          style: { "--pull": `${Math.round((75 * (nats ?? 0)) / most)}%` },
          dataset: { token },
        },
        ...tokenText(text),
      );
    });
    const node = element("div", { className: "text" }, ...this.spans);
    const tokenOf = ({ target }) => target.closest(".token")?.dataset.token;
    node.onclick = (event) => tokenOf(event) && this.actions.select(run, Number(tokenOf(event)));
    return node;
  }

  update(state) {
    const { run } = this;
    const token = state.token.get(run);
    this.difference?.update(state);
    if (token !== this.token) {
      this.token = token;
      this.title.replaceChildren("After ", chip(run.labels[token]), ` (position ${token})`);
      this.#likeliest(token);
      this.#lens(token);
      this.chosen?.setAttribute("aria-selected", "false");
      this.chosen = this.spans[token];
      this.chosen.setAttribute("aria-selected", "true");
      scrollWithin(this.text, this.chosen);
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
        : [
            "What follows is ",
            chip(real[0]),
            `: ${number(run.loss[token + 1])} nats, ${surpriseInWords(run.loss[token + 1])}.`,
          ]),
    );
    const branch = (label, id) =>
      GIVEN.live
        ? goButton(`go on with ${label} instead`, () => actions.branch(run, token, id, label), chip(label))
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
                element("th", { scope: "row", textContent: layer ? `after layer ${layer}` : "embedding" }),
                ...run.next(layer, token).map(([label, chance, id]) => {
                  const cell = element(
                    "td",
                    { ...chanceBar(chance), title: `${label} ${percent(chance)}` },
                    chip(cut(label)),
                    " ",
                    percent(chance),
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
