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

const DIFFERENT = 4; // sources, and tokens, that are listed

// Where the pull of one run and the attention of the other differ most: on the selected token, and
// over the text.
class PullDifference {
  constructor(run, other, actions) {
    Object.assign(this, { runs: [run, other], actions, pieces: commonPieces(run, other) });
    const [mine, others] = [run, other].map(pullWord);
    this.words = mine === others ? `the ${mine} of both` : `${mine} against ${others}`;
    this.found = []; // [token, share that is elsewhere], as far as it is counted
    this.here = element("p", { className: "chosen" });
    this.everywhere = element("p", { className: "chosen", textContent: "Counting …" });
    this.node = element(
      "div",
      { className: "differ", title: "shares, mean over all layers and heads" },
      this.here,
      this.everywhere,
    );
  }

  // Per piece of text up to the tokens [both ranges, share in one run, share in the other], and the
  // share that is at other sources.
  #compare(tokens) {
    const shares = this.runs.map((run, n) => meanShares(run, tokens[n]));
    const rows = this.pieces
      .filter((ranges) => ranges.some(([from], n) => from <= tokens[n]))
      .map((ranges) => [ranges, ...ranges.map((range, n) => sumOver(shares[n], range))]);
    return [rows, rows.reduce((sum, [, a, b]) => sum + Math.abs(a - b), 0) / 2];
  }

  #go(token, text) {
    const [run] = this.runs;
    const select = () => this.actions.select(run, token);
    return goButton(`select position ${token}`, select, chip(run.labels[token]), context(text));
  }

  update(state) {
    const [run] = this.runs;
    const tokens = this.runs.map((which) => state.token.get(which));
    if (String(tokens) === this.drawn) return;
    this.drawn = String(tokens);
    const [rows] = this.#compare(tokens);
    const most = rows
      .toSorted((a, b) => Math.abs(b[1] - b[2]) - Math.abs(a[1] - a[2]))
      .slice(0, DIFFERENT);
    this.here.replaceChildren(
      "On ",
      chip(run.labels[tokens[0]]),
      ` most different, ${this.words}:`,
      ...most.map(([[[token]], mine, others]) =>
        this.#go(token, `${percent(mine)} against ${percent(others)}`),
      ),
    );
  }

  // Counts the tokens one by one.
  *jobs() {
    const [run] = this.runs;
    for (const [[token], [others]] of this.pieces.slice(this.found.length)) {
      this.found.push([token, this.#compare([token, others])[1]]);
      yield;
    }
    // of equal tokens the one on which they differ most
    const first = new Map(
      this.found.toSorted((a, b) => a[1] - b[1]).map((one) => [run.tokens[one[0]], one]),
    );
    const most = [...first.values()].toSorted((a, b) => b[1] - a[1]).slice(0, DIFFERENT);
    this.everywhere.replaceChildren(
      "In the whole text they differ most on",
      ...most.map(([token, share]) => this.#go(token, `${percent(share)} goes to other tokens`)),
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
    this.node = element("div", {}, note(this.#sum()), this.strip.canvas, this.told);
    this.#tell(null);
  }

  #sum() {
    const { run, other, of } = this;
    const sum = of.reduce((a, b) => a + b, 0);
    const better = of.filter((x) => x > 0).length;
    const unit = this.run.count === this.other.count ? "token" : "piece of text that both share";
    if (!of.length) return "The two share no piece of text.";
    return (
      `${run.name} expects the text ${sum < 0 ? "worse" : "better"} than ${other.name} by ${number(Math.abs(sum))} nats in all, ` +
      `${number(Math.abs(sum) / of.length)} per ${unit}, and is better at ${plain.format(better)} of ${plain.format(of.length)}.`
    );
  }

  #tell(n) {
    if (n === null) {
      this.told.textContent = `Up: ${this.run.name} is less surprised here. Down: ${this.other.name} is.`;
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
      40,
    );
  }
}
