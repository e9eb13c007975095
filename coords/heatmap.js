// One head, large: every token's row, with the tokens along both sides.
const [LEFT, BELOW, ABOVE] = [84, 66, 7]; // room for the names of tokens
class Heatmap {
  constructor(run, actions) {
    Object.assign(this, { run, actions, at: null, drawn: "" });
    this.canvas = element("canvas", { tabIndex: 0 });
    this.canvas.setAttribute("role", "application");
    this.told = element("output", { className: "note" });
    this.node = element("div", { className: "heatmap" }, this.canvas, this.told);
    this.canvas.onpointermove = (event) => this.#tell(...this.#under(event));
    this.canvas.onclick = (event) => {
      const [token] = this.#under(event);
      if (token !== null) actions.select(run, token);
    };
    this.canvas.onkeydown = (event) => this.#key(event);
  }

  draw(layer, head, token, side) {
    const { run } = this;
    Object.assign(this, { layer, head, token, side });
    const key = [layer, head, side, run.count].join(" ");
    if (key !== this.drawn) this.grid = gridOf(run, layer, head, Math.floor(side));
    this.drawn = key;
    const ink = blank(this.canvas, side + LEFT, side + ABOVE + BELOW);
    this.canvas.style.width = `${side + LEFT}px`;
    ink.translate(0, ABOVE);
    ink.strokeStyle = css("--line");
    ink.strokeRect(LEFT - 0.5, 0.5, side, side);
    paintGrid(ink, this.grid, LEFT, 0, side, side);
    const cell = side / run.count;
    ink.font = `11px ${css("--mono")}`;
    ink.textBaseline = "middle";
    ink.textAlign = "right";
    const every = Math.ceil(13 / cell);
    const short = (n) =>
      run.labels[n].length > 8 ? `${run.labels[n].slice(0, 7)}…` : run.labels[n];
    for (let n = 0; n < run.count; n += every) {
      ink.fillStyle = css(n === token ? "--ink" : "--soft");
      const name = every > 1 ? `${short(n)} ${n}` : short(n);
      ink.fillText(name, LEFT - 5, (n + 0.5) * cell, LEFT - 6);
      ink.save();
      ink.translate(LEFT + (n + 0.5) * cell, side + 5);
      ink.rotate(-Math.PI / 2);
      ink.fillText(name, 0, 0, BELOW - 6);
      ink.restore();
    }
    ink.strokeStyle = css("--twin");
    ink.strokeRect(LEFT, token * cell, side, Math.max(cell, 1.5));
    this.canvas.setAttribute(
      "aria-label",
      `Shares of the pull, a row per token and a column per source. Arrow keys move, Enter selects the row's token.`,
    );
    if (this.at === null || this.at[0] >= run.count)
      this.#tell(token, this.#strongest(token, 0, token + 1));
    else this.#tell(...this.at);
  }

  #strongest(token, from, end) {
    const shares = this.run.shares(this.layer, this.head, token);
    let best = Math.min(from, token);
    for (let source = best; source < Math.min(end, token + 1); source++)
      if (shares[source] > shares[best]) best = source;
    return best;
  }

  // The token and the source under the pointer; of a cell with several sources the strongest.
  #under(event) {
    const { run, side } = this;
    const box = this.canvas.getBoundingClientRect();
    const [x, y] = [event.clientX - box.left - LEFT, event.clientY - box.top - ABOVE];
    if (x < 0 || y < 0 || x >= side || y >= side) return [null, null];
    const token = Math.floor((y / side) * run.count);
    const { n } = this.grid;
    const column = Math.floor((x / side) * n);
    const [from, end] = [column, column + 1].map((c) => Math.ceil((c * run.count) / n));
    return from > token ? [null, null] : [token, this.#strongest(token, from, end)];
  }

  #tell(token, source) {
    if (token === null) return;
    const { run } = this;
    this.at = [token, source];
    const share = run.shares(this.layer, this.head, token)[source];
    this.told.replaceChildren(
      chip(run.labels[token]),
      ` (${token}) gets ${percent(share)} from `,
      chip(run.labels[source]),
      ` (${source}), ${distanceBack(token, source)}`,
    );
  }

  #key(event) {
    const moves = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] };
    let [token, source] = this.at;
    if (event.key === "Enter") this.actions.select(this.run, token);
    else if (moves[event.key]) {
      token = Math.max(0, Math.min(this.run.count - 1, token + moves[event.key][0]));
      source = Math.max(0, Math.min(token, source + moves[event.key][1]));
      this.#tell(token, source);
    } else return;
    event.preventDefault();
    event.stopPropagation();
  }
}
