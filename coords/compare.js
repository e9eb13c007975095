// Two runs of one text: where the two pull differently, and which of them expected what comes next.

// Ranges of tokens of both runs that hold the same characters, as [[from, end], [from, end]]. With
// one vocabulary these are the tokens.
function commonPieces(one, other) {
  const firsts = [one, other].map((run) => {
    const first = new Map(run.starts.map((start, token) => [start, token]).reverse());
    first.set(run.starts.at(-1) + [...run.texts.at(-1)].length, run.count);
    return first;
  });
  const edges = [...firsts[0].keys()].filter((start) => firsts[1].has(start)).sort((a, b) => a - b);
  return edges
    .slice(1)
    .map((end, n) => firsts.map((first) => [first.get(edges[n]), first.get(end)]));
}

const pieceLabel = (run, [from, end]) => run.labels.slice(from, end).join("");
const sumOver = (values, [from, end]) =>
  Array.from(values.slice(from, end)).reduce((a, b) => a + b, 0);

// The share that every source has of the pull on a token, mean over all layers and heads.
function meanShares(run, token) {
  const sum = new Float64Array(token + 1);
  for (let layer = 1; layer <= run.numLayers; layer++)
    run.shares(layer, "mean", token).forEach((share, n) => (sum[n] += share / run.numLayers));
  return sum;
}

const DIFFERENT = 6; // sources that are listed

// Where the pull of one run and of the other on the selected token differ most.
class PullDifference {
  constructor(run, other, actions) {
    Object.assign(this, { run, other, actions, pieces: commonPieces(run, other) });
    this.node = element("div", { className: "differ" });
  }

  update(state) {
    const { run, other } = this;
    const runs = [run, other];
    const tokens = runs.map((which) => state.token.get(which));
    const shares = runs.map((which, n) => meanShares(which, tokens[n]));
    const rows = this.pieces
      .filter((ranges) => ranges.some(([from], n) => from <= tokens[n]))
      .map((ranges) => [ranges, ...ranges.map((range, n) => sumOver(shares[n], range))]);
    const elsewhere = rows.reduce((sum, [, a, b]) => sum + Math.abs(a - b), 0) / 2;
    const most = rows
      .sort((a, b) => Math.abs(b[1] - b[2]) - Math.abs(a[1] - a[2]))
      .slice(0, DIFFERENT);
    this.node.replaceChildren(
      heading("Where the two differ most on the selected token"),
      element(
        "table",
        {},
        element(
          "thead",
          {},
          element(
            "tr",
            {},
            ...["source", run.name, other.name].map((textContent) =>
              element("th", { scope: "col", textContent }),
            ),
          ),
        ),
        element(
          "tbody",
          {},
          ...most.map(([ranges, ...both]) =>
            element(
              "tr",
              {},
              element(
                "th",
                { scope: "row" },
                goButton(
                  `select position ${ranges[0][0]}`,
                  () => this.actions.select(run, ranges[0][0]),
                  chip(cut(pieceLabel(run, ranges[0]))),
                  context(distanceBack(tokens[0], Math.min(tokens[0], ranges[0][1] - 1))),
                ),
              ),
              ...both.map((share) =>
                element("td", {
                  textContent: percent(share),
                  className: "bar",
                  style: { "--share": `${100 * share}%` },
                }),
              ),
            ),
          ),
        ),
      ),
      note(
        `Shares of the pull or attention on it, mean over all layers and heads; ${percent(elsewhere)} in all is at other sources.`,
      ),
    );
  }
}

// Token by token, how much better one of the two runs expected what follows.
class LossDifference {
  constructor(run, other, actions) {
    Object.assign(this, { run, other });
    // the first token is expected by nobody
    this.pieces = commonPieces(run, other).filter((ranges) => ranges.every(([from]) => from > 0));
    this.of = this.pieces.map(
      ([mine, others]) => sumOver(other.loss, others) - sumOver(run.loss, mine),
    );
    this.strip = new Strip(
      `Surprise of ${other.name} minus that of ${run.name}, a bar per token`,
      (n) => actions.select(run, this.pieces[n][0][0]),
      (n) => this.#tell(n),
    );
    this.told = element("output", { className: "note" });
    this.node = element(
      "figure",
      {},
      element("figcaption", { textContent: `${run.name} against ${other.name}, token by token` }),
      element("p", { textContent: this.#sum() }),
      this.strip.canvas,
      this.told,
    );
    this.#tell(null);
  }

  #sum() {
    const { run, other, of } = this;
    const sum = of.reduce((a, b) => a + b, 0);
    const better = of.filter((x) => x > 0).length;
    const unit = this.run.count === this.other.count ? "token" : "piece of text that both share";
    if (!of.length) return "The two share no piece of text.";
    return (
      `${(sum < 0 ? other : run).name} expects the text better by ${number(Math.abs(sum))} nats in all, ` +
      `${number(Math.abs(sum) / of.length)} per ${unit}: ${run.name} is better at ${plain.format(better)} of ${plain.format(of.length)}.`
    );
  }

  #tell(n) {
    if (n === null) {
      this.told.textContent = `Up: ${this.run.name} is less surprised. Down: ${this.other.name} is.`;
      return;
    }
    const [mine, others] = this.pieces[n];
    this.told.replaceChildren(
      chip(pieceLabel(this.run, mine)),
      ` ${number(sumOver(this.run.loss, mine))} nats for ${this.run.name}, ${number(sumOver(this.other.loss, others))} for ${this.other.name}`,
    );
  }

  update(state) {
    const token = state.token.get(this.run);
    this.strip.draw(
      this.of,
      this.pieces.findIndex(([[from, end]]) => from <= token && token < end),
    );
  }
}
