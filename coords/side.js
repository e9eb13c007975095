// Beside the view: the text, token by token.

const RINGED = 6; // of the same token elsewhere, the nearest
const SHADED = 0.005; // sources with a smaller share of the pull stay unshaded
const MARKS = { "␣": " ", "⏎": "\n", "⇥": "\t" };
const unmarked = (text) => text.replace(/[␣⏎⇥]/g, (mark) => MARKS[mark]);

// The orbit shows one head: the chosen one, or for "mean" that with the strongest single pull.
const orbitHead = (state, run) => {
  const layer = Math.max(1, run.layerOf(state.layer));
  if (state.head !== "mean" && state.head < run.numHeads) return state.head;
  const token = state.token.get(run);
  const strongest = Array.from(
    { length: run.numHeads },
    (_, head) => run.pulls(layer, head, token, 1)[0]?.[1] ?? 0,
  );
  return strongest.indexOf(Math.max(...strongest));
};
// The head whose pulls text and details show: always that of the picture.
const shownHead = (state, run) => {
  if (state.view === "orbit" && run.hasGravity) return orbitHead(state, run);
  return state.head < run.numHeads ? state.head : "mean";
};

const isBroken = (before, after) =>
  /[^\p{L}\p{N}\p{M}]$/u.test(before) || /^[^\p{L}\p{N}\p{M}]/u.test(after);
const startsWord = (run, token) => !token || isBroken(run.texts[token - 1], run.texts[token]);
// The first token of the word that holds a token, and the one after its last.
const wordAround = (run, token) => {
  let [first, end] = [token, token + 1];
  while (!startsWord(run, first)) first--;
  while (end < run.count && !startsWord(run, end)) end++;
  return [first, end];
};

// What a stranger should see first: the most surprising word of the second half of the text.
const firstToken = (run) => {
  const half = run.labels.map((_, token) => token).slice(Math.floor(run.count / 2));
  const isWord = (token) => /[\p{L}\p{N}]/u.test(run.texts[token]);
  const words = half.filter((token) => isWord(token) && startsWord(run, token));
  const among = words.length ? words : half;
  return among.reduce((best, token) => (run.loss[token] > run.loss[best] ? token : best));
};

// The other places of the same token, [place, distance], nearest first: by the coordinates after
// the shown layer, or for a model without any by the distance in the text.
const nearestTwins = (run, layer, token) =>
  run
    .twins(token)
    .map((twin) => [twin, run.z ? run.distance(layer, token, twin) : Math.abs(token - twin)])
    .sort((a, b) => a[1] - b[1]);

const SPACED_WORD = /^␣(?=[^␣⏎⇥])/u;

class Words {
  constructor(run, actions) {
    Object.assign(this, { run, lit: new Set(), ringed: [], found: [] });
    this.prefix = `text-${RUNS.indexOf(run)}-`;
    this.text = element("div", { className: "text", tabIndex: 0 });
    for (const [name, value] of [
      ["role", "listbox"],
      ["aria-label", `The text${RUNS.length > 1 ? ` of ${run.name}` : ""}, token by token`],
      ["aria-orientation", "horizontal"],
    ])
      this.text.setAttribute(name, value);
    this.spoken = element("p", { className: "spoken" });
    this.spoken.setAttribute("aria-live", "polite");
    // Korean puts spaces between words, and a browser would break inside them
    this.text.classList.toggle("spaced", run.texts.some((text) => /\p{Script=Hangul}/u.test(text)));
    this.spans = run.texts.map((text, token) => this.#span(text, token));
    // a word's space stands before it: shaded, it would hang at the end of a line
    for (const [token, span] of this.spans.entries())
      this.text.append(...(SPACED_WORD.test(run.texts[token]) ? [" "] : []), span);
    this.node = element(
      "section",
      { className: "words" },
      this.text,
      note(
        `Shaded: what ${run.hasGravity ? "pulls the selected token" : "the selected token looks at"}. Blue ring: the same token elsewhere.`,
      ),
      this.spoken,
    );
    const tokenOf = (event) => event.target.closest(".token")?.dataset.token;
    this.text.addEventListener("click", (event) => {
      if (tokenOf(event)) actions.select(run, Number(tokenOf(event)));
    });
    this.text.addEventListener("pointerover", (event) => {
      if (tokenOf(event) && event.pointerType !== "touch")
        actions.hover(run, Number(tokenOf(event)));
    });
    this.text.addEventListener("pointerleave", () => actions.hover(run, null));
  }

  // Spaces and line ends are themselves; their marks show while one points at the token.
  #span(text, token) {
    const shown = unmarked(text);
    const textContent = SPACED_WORD.test(text) ? shown.slice(1) : shown;
    const span = element("span", { id: this.prefix + token, className: "token", textContent });
    span.classList.toggle("spaced", textContent !== shown);
    span.dataset.token = token;
    const lead = /^[␣⏎⇥]+/.exec(text)?.[0];
    if (lead) span.dataset.mark = lead;
    // a line end alone has no width to point at, nor has a token that only continues a character
    span.classList.toggle("end", text.startsWith("⏎"));
    span.classList.toggle("part", text === "");
    span.setAttribute("role", "option");
    if (shown !== this.run.labels[token])
      span.setAttribute("aria-label", this.run.labels[token]);
    span.setAttribute("aria-selected", "false");
    return span;
  }

  update(state) {
    const { run } = this;
    const [token, layer] = [state.token.get(run), run.layerOf(state.layer)];
    const head = shownHead(state, run);
    this.#paint(state.colour);
    if (this.drawn === `${token} ${layer} ${head}`) return;
    this.drawn = `${token} ${layer} ${head}`;
    this.#shade(layer ? run.shares(layer, head, token) : []);
    for (const twin of this.ringed) this.spans[twin].classList.remove("twin");
    this.ringed = nearestTwins(run, layer, token)
      .slice(0, RINGED)
      .map(([twin]) => twin);
    for (const twin of this.ringed) this.spans[twin].classList.add("twin");
    if (this.selected !== token) {
      this.spans[this.selected]?.setAttribute("aria-selected", "false");
      this.spans[token].setAttribute("aria-selected", "true");
      this.selected = token;
      this.text.setAttribute("aria-activedescendant", this.prefix + token);
      scrollWithin(this.text, this.spans[token]);
    }
    this.spoken.textContent = spokenToken(
      token,
      run.mass?.[token] ?? null,
      run.pulls(layer, head, token, 3),
      run.quietOf(layer, head, token),
      (source) => run.labels[source],
    );
  }

  #shade(shares) {
    const lit = new Set();
    shares.forEach((share, source) => {
      if (share < SHADED) return;
      lit.add(source);
      const span = this.spans[source];
      span.style.setProperty("--pull", `${Math.round(8 + 72 * Math.sqrt(share))}%`);
      span.classList.add("source");
    });
    for (const source of this.lit) {
      if (lit.has(source)) continue;
      this.spans[source].style.removeProperty("--pull");
      this.spans[source].classList.remove("source");
    }
    this.lit = lit;
  }

  // Lines under the tokens in the chosen colour; none until one is chosen.
  #paint(colour) {
    const painted = `${colour} ${dark.matches}`;
    if (this.painted === painted || (!this.painted && colour === "none")) return;
    this.painted = painted;
    const colours = colour === "none" ? null : colouring(this.run, colour).colours;
    this.text.classList.toggle("coloured", colours !== null);
    if (!colours) return;
    this.spans.forEach((span, token) => span.style.setProperty("--own", colours[token]));
  }

  hover(token) {
    this.spans[this.hovered]?.classList.remove("hovered");
    this.spans[token]?.classList.add("hovered");
    this.hovered = token;
  }

  // Marks the tokens that a search found.
  mark(found) {
    for (const token of this.found) this.spans[token].classList.remove("found");
    for (const token of found) this.spans[token].classList.add("found");
    this.found = found;
  }
}
