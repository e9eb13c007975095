// The first view: the selected token in the centre, and every source at its distance from it.
//
// The direction of a source is its own place along the first two principal axes of the head's
// space, seen from the middle of all: it keeps it whatever token is selected.

class Orbit {
  constructor(run, actions) {
    Object.assign(this, { run, actions });
    this.node = element("section", { className: "orbit" });
    if (!run.hasGravity) return this.#refuse();
    this.angles = new Map();
    this.picture = new OrbitPicture(`orbit-${RUNS.indexOf(run)}`);
    this.told = element("div", { className: "orbit-note", hidden: true });
    this.why = element("div", { className: "orbit-why", title: RULE });
    this.strip = new HeadStrip(run, actions);
    this.key = new OrbitKey(run, actions);
    this.node.append(
      element("div", { className: "orbit-picture" }, this.picture.node, this.told),
      element("div", { className: "orbit-below" }, this.why, this.key.node, this.strip.node),
    );
    this.#listen();
  }

  #refuse() {
    this.node.classList.add("refused");
    this.node.append(
      element("p", {
        textContent:
          "A vanilla transformer has no masses and distances; its heads are under Heads.",
      }),
      element("button", {
        className: "primary",
        type: "button",
        textContent: "Show its heads",
        onclick: () => this.actions.set({ view: "heads" }),
      }),
    );
  }

  #listen() {
    const { node } = this.picture;
    node.addEventListener("pointermove", (event) => {
      if (event.pointerType !== "touch") this.#point(this.picture.sourceAt(event));
    });
    node.addEventListener("pointerleave", () => this.#point(null));
    node.addEventListener("focusin", (event) => this.#point(this.picture.sourceAt(event)));
    node.addEventListener("focusout", () => this.#point(null));
    node.addEventListener("click", (event) => {
      const source = this.picture.sourceAt(event);
      if (source !== null) this.actions.select(this.run, source);
    });
  }

  // Enter and the space key select the source whose name has the focus, which goes on to the name
  // of that one's strongest source.
  keys(event) {
    const name = event.target.closest(".orbit .name");
    if (!name || !["Enter", " "].includes(event.key)) return false;
    this.actions.select(this.run, Number(name.dataset.source));
    this.picture.node.querySelector(".name")?.focus();
    return true;
  }

  #point(source) {
    if (source !== this.pointed) this.actions.hover(this.run, source);
  }

  // Tells of a source beside its dot; null hides the note.
  hover(source) {
    if (!this.picture) return;
    const { dots, size, shown } = this.picture;
    dots.get(this.pointed)?.circle.classList.remove("pointed");
    this.pointed = source;
    const dot = dots.get(source);
    this.told.hidden = !dot;
    if (!dot) return;
    dot.circle.classList.add("pointed");
    const [x, y] = dot.to;
    this.told.style.cssText =
      (x > size[0] / 2 ? `right:${size[0] - x + 14}px;` : `left:${x + 14}px;`) +
      (y > size[1] / 2 ? `bottom:${size[1] - y}px` : `top:${y}px`);
    const { run } = this;
    const { distance, space, time } = shown.orbit;
    const parts = [space, time].map((part) => number(part[source], 2));
    this.told.replaceChildren(
      element("p", {}, chip(run.labels[source]), ` ${percent(shown.shares[source])} of the pull`),
      note(
        `distance ${number(distance[source], 2)}` +
          (run.kind === "published" ? "" : `: ${parts[0]} in space, ${parts[1]} in time`),
      ),
      note(`${distanceBack(shown.token, source)}, mass ${number(run.mass[source])}`),
    );
  }

  #anglesOf(layer, head) {
    const name = `${layer} ${head}`;
    if (!this.angles.has(name)) {
      const { x, y } = this.run.orbit(layer, head, this.run.count - 1);
      const [middleX, middleY] = [x, y].map((all) => all.reduce((a, b) => a + b) / all.length);
      const angles = x.map((across, n) => Math.atan2(y[n] - middleY, across - middleX));
      this.angles.set(name, angles);
    }
    return this.angles.get(name);
  }

  update(state) {
    const { run } = this;
    this.state = state;
    if (!run.hasGravity) return;
    const [token, layer] = [state.token.get(run), Math.max(1, run.layerOf(state.layer))];
    const head = orbitHead(state, run);
    const why = state.head === head ? "" : " (strongest here)";
    const title = `layer ${layer}, head ${head + 1}${why}`;
    const shown = {
      ...{ run, token, layer, head, title },
      orbit: run.orbit(layer, head, token),
      shares: run.shares(layer, head, token),
      quiet: run.quietOf(layer, head, token),
      angles: this.#anglesOf(layer, head),
      isSplit: state.split === "axes" && run.kind !== "published",
    };
    this.hover(null);
    // first the words: the picture takes the room that they leave
    const [sentence, more] = whyPulled(shown);
    this.why.replaceChildren(element("p", {}, ...sentence), note(more.join("")));
    this.picture.draw(shown, state.playing);
    this.picture.node.setAttribute("aria-label", `${title}. ${this.why.firstChild.textContent}`);
    const { unit, drawn } = this.picture;
    this.key.update(state.split, unit, drawn.length, token + 1);
    this.strip.update(layer, head, token);
  }

  // Begins with the sentence that holds the selected token, or goes on where it was stopped.
  play(isPlaying) {
    clearTimeout(this.timer);
    // of two runs one leads
    if (!isPlaying || this.run !== RUNS.find((run) => run.hasGravity)) return;
    const { run, actions, state } = this;
    const token = state.token.get(run);
    const isAtEnd = token + 1 >= run.count;
    const seen = () =>
      [state.view, state.layer, state.head, state.split, state.token.get(run)].join();
    const step = (next) => {
      actions.set({ token: next }, run);
      this.stoppedAt = next;
      const left = seen();
      const pause = clamped(170 + 60 * run.labels[next].length, 230, 700);
      this.timer = setTimeout(() => {
        if (seen() !== left || next + 1 >= run.count) actions.set({ playing: false });
        else step(next + 1);
      }, pause);
    };
    step(isAtEnd ? 0 : token === this.stoppedAt ? token : this.#sentenceStart(token));
  }

  #sentenceStart(token) {
    let first = token;
    while (first > 0 && !/[.!?⏎]$/.test(this.run.labels[first - 1])) first -= 1;
    return first;
  }

  svg() {
    return this.picture.node;
  }
}
