// The first view: the selected token in the centre, and every source at its distance from it.
//
// How far out a source is drawn is the logarithm of its softened distance sqrt(1 + r²), which the
// law raises to a power: equal steps outwards make the pull weaker by equal factors. Its direction
// is its own place in the head's space, so that it keeps it whatever token is selected.

const MOST_DOTS = 600; // of a longer text, half of them are the strongest sources
const LABELLED = 8;
const LEAST_LABELLED = 0.004; // of the pull
const LEAST_LINE = 0.0015;
const RINGS = [0.3, 1, 3, 10, 30, 100, 300, 1000, 3000, 10000];
const BETWEEN_RINGS = [2, 5, 20, 50, 200, 500, 2000, 5000];
const GLIDE = 320; // milliseconds
const FALL = 450;

const clamped = (x, low, high) => Math.max(low, Math.min(high, x));
const sourceText = (label) => cut(label.replace(/^␣(?=.)/, ""));

class Orbit {
  constructor(run, actions) {
    Object.assign(this, { run, actions });
    this.node = element("section", { className: "orbit" });
    if (!run.hasGravity) return this.#refuse();
    this.dots = new Map();
    this.angles = new Map();
    this.progress = 1;
    this.layers = Object.fromEntries(
      ["rings", "lines", "dots", "labels", "centre"].map((name) => [
        name,
        svgElement("g", { class: name }),
      ]),
    );
    this.picture = svgElement("svg", { class: "sky", role: "group" }, ...Object.values(this.layers));
    this.told = element("div", { className: "orbit-note", hidden: true });
    this.why = element("p", { className: "orbit-why" });
    this.strip = new Strip(run, actions);
    this.key = new Key(run, actions);
    this.node.append(
      element("div", { className: "sky-frame" }, this.picture, this.told),
      element(
        "div",
        { className: "orbit-below" },
        element("div", { className: "orbit-words" }, this.why, this.key.node),
        this.strip.node,
      ),
    );
    this.#listen();
  }

  #refuse() {
    this.node.classList.add("empty");
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
    const sourceOf = (event) => {
      const label = event.target.closest?.("[data-source]");
      return label?.dataset.source ? Number(label.dataset.source) : this.#nearest(event);
    };
    const choose = (source) => source !== null && this.actions.select(this.run, source);
    this.picture.addEventListener("pointermove", (event) => {
      if (event.pointerType !== "touch") this.#point(sourceOf(event));
    });
    this.picture.addEventListener("pointerleave", () => this.#point(null));
    this.picture.addEventListener("click", (event) => choose(sourceOf(event)));
    this.picture.addEventListener("focusin", (event) => this.#point(sourceOf(event)));
    this.picture.addEventListener("focusout", () => this.#point(null));
  }

  // Enter and the space key choose the source that has the focus.
  keys(event) {
    const source = event.target.dataset?.source;
    if (source === undefined || !["Enter", " "].includes(event.key)) return false;
    this.actions.select(this.run, Number(source));
    return true;
  }

  #point(source) {
    if (source === this.pointed) return;
    this.pointed = source;
    this.actions.hover(this.run, source);
    this.hover(source);
  }

  // The source under the pointer, or close to it for a finger.
  #nearest({ clientX, clientY, pointerType }) {
    const box = this.picture.getBoundingClientRect();
    let [found, least] = [null, pointerType === "touch" ? 26 : 14];
    for (const [source, { to, size }] of this.dots) {
      const away = Math.hypot(to[0] + box.left - clientX, to[1] + box.top - clientY) - size / 2;
      if (away < least) [found, least] = [source, away];
    }
    return found;
  }

  // Tells of a source beside it; null hides the note.
  hover(source) {
    const dot = this.dots?.get(source);
    this.told.hidden = !dot;
    for (const [other, { node }] of this.dots ?? []) node.classList.toggle("pointed", other === source);
    if (!dot) return;
    const [x, y] = dot.to;
    const [width, height] = this.size;
    const style = this.told.style;
    style.cssText = "";
    style.setProperty(x > width / 2 ? "right" : "left", `${(x > width / 2 ? width - x : x) + 14}px`);
    style.setProperty(y > height / 2 ? "bottom" : "top", `${y > height / 2 ? height - y : y}px`);
    const { shares, orbit, token } = this.shown;
    const parts =
      this.run.kind === "published"
        ? ""
        : `: ${number(orbit.space[source])} in space, ${number(orbit.time[source])} in time`;
    this.told.replaceChildren(
      element(
        "p",
        {},
        chip(this.run.labels[source]),
        " ",
        bold(percent(shares[source])),
        " of the pull",
      ),
      note(`distance ${number(orbit.distance[source])}${parts}`),
      note(`${distanceBack(token, source)} · mass ${number(this.run.mass[source])}`),
    );
  }

  // The direction of each source's own place, from the middle of all, in radians.
  #anglesOf(layer, head) {
    const name = `${layer} ${head}`;
    if (!this.angles.has(name)) {
      const { x, y } = this.run.orbit(layer, head, this.run.count - 1);
      const middle = [x, y].map((axis) => axis.reduce((a, b) => a + b) / axis.length);
      this.angles.set(
        name,
        x.map((across, source) => Math.atan2(y[source] - middle[1], across - middle[0])),
      );
    }
    return this.angles.get(name);
  }

  update(state) {
    const { run } = this;
    if (!run.hasGravity) return;
    const token = state.token.get(run);
    const layer = Math.max(1, run.layerOf(state.layer));
    const head = orbitHead(state, run);
    const orbit = run.orbit(layer, head, token);
    const shares = run.shares(layer, head, token);
    const quiet = run.quietOf(layer, head, token);
    const before = this.shown?.token;
    this.shown = { token, layer, head, orbit, shares, isPlaying: state.playing };
    this.state = state;
    const frame = this.picture.parentElement;
    const size = [Math.max(240, frame.clientWidth), Math.max(240, frame.clientHeight)];
    const isSameSize = String(size) === String(this.size);
    this.size = size;
    this.picture.setAttribute("viewBox", `0 0 ${size[0]} ${size[1]}`);
    const isSplit = state.split === "axes" && run.kind !== "published";
    const place = new (isSplit ? Axes : Circles)(orbit, this.#anglesOf(layer, head), size);
    this.picture.classList.toggle("axes", isSplit);
    const order = [...shares.keys()].sort((a, b) => shares[b] - shares[a]);
    const drawn = this.#drawnOf(order);
    this.#drawRings(place, isSplit);
    this.#drawDots(place, drawn, before);
    this.#drawCentre(place);
    this.#drawLabels(place, order);
    this.hover(null);
    this.pointed = null;
    const words = whyPulled(run, layer, head, token, shares, orbit, quiet);
    this.why.replaceChildren(...words);
    this.picture.setAttribute("aria-label", this.why.textContent);
    this.key.update(state, drawn.length, order.length);
    this.strip.update(layer, head, token);
    this.#glide(before === undefined || !isSameSize ? 0 : state.playing ? FALL : GLIDE);
  }

  // Of thousands of sources the strongest, and a sample of the others.
  #drawnOf(order) {
    if (order.length <= MOST_DOTS) return order;
    const strong = order.slice(0, MOST_DOTS / 2);
    const others = order.slice(MOST_DOTS / 2).sort((a, b) => a - b);
    const step = Math.ceil(others.length / (MOST_DOTS / 2));
    return [...strong, ...others.filter((_, n) => n % step === 0)];
  }

  #drawRings(place, isSplit) {
    const far = isSplit ? Math.hypot(...place.far) : place.far;
    const inside = RINGS.filter((ring) => ring <= far);
    const rings = inside.length > 2 ? inside : [...inside, ...BETWEEN_RINGS.filter((x) => x <= far)];
    const paths = rings.map((ring) => svgElement("path", { d: place.ring(ring) }));
    this.taken = [];
    const texts = rings
      .sort((a, b) => a - b)
      .flatMap((ring) => place.ticks(ring).map(([x, y]) => [x, y, plainRing(ring)]))
      .filter(([x, y]) => {
        const box = [x - 13, y - 7, x + 13, y + 7];
        return isFree(box, this.taken) && this.taken.push(box);
      })
      .map(([x, y, text]) => svgElement("text", { x, y, dy: "0.35em" }, text));
    const [x, y] = place.origin;
    const { layer, head } = this.shown;
    const title = `layer ${layer} · head ${head + 1}${this.state.head === "mean" ? " (its strongest here)" : ""}`;
    const captions = [[12, 20, title, "start"]];
    if (isSplit)
      captions.push(
        [this.size[0] - 12, y + 32, "distance in space, in softenings →", "end"],
        [12, 40, "↑ distance in time", "start"],
      );
    else captions.push([this.size[0] - 12, 20, "rings: distance in softenings", "end"]);
    const { radius } = this.run.attention.heads[layer - 1][head];
    const isCut = radius !== null && this.run.attention.cutoff !== "none" && radius < far;
    this.layers.rings.replaceChildren(
      svgElement("circle", { class: "well", cx: x, cy: y, r: isSplit ? 150 : 0.62 * place.radius }),
      ...paths,
      ...(isCut ? [svgElement("path", { class: "cutoff", d: place.ring(radius) })] : []),
      ...texts,
      ...captions.map(([x, y, text, anchor]) =>
        svgElement("text", { class: "caption", x, y, "text-anchor": anchor }, text),
      ),
    );
  }

  #drawDots(place, drawn, before) {
    const { orbit, shares, token } = this.shown;
    const { size } = massScale(this.run);
    const kept = new Set(drawn);
    for (const [source, { node, line }] of this.dots) {
      if (kept.has(source)) continue;
      node.remove();
      line.remove();
      this.dots.delete(source);
    }
    for (const source of drawn) {
      const to = place.at(source);
      const isNew = !this.dots.has(source);
      if (isNew) this.#addDot(source);
      const dot = this.dots.get(source);
      const outside = to.map((x, axis) => x + 0.25 * (x - place.origin[axis]));
      dot.from = isNew ? (source === token || source === before ? place.origin : outside) : dot.now;
      dot.fromWidth = isNew ? 0 : dot.width;
      const share = shares[source];
      dot.to = to;
      dot.size = size(this.run.mass[source]);
      dot.toWidth = share < LEAST_LINE ? 0 : 15 * Math.sqrt(share);
      const late = Math.round((100 * orbit.time[source] ** 2) / orbit.distance[source] ** 2) || 0;
      const strength = Math.sqrt(share);
      dot.node.setAttribute("r", dot.size.toFixed(2));
      dot.node.setAttribute("style", `--late:${late}%;--strength:${clamped(0.25 + 2.2 * strength, 0, 1).toFixed(2)}`);
      dot.line.setAttribute("style", `--late:${late}%;--strength:${clamped(0.15 + strength, 0, 0.9).toFixed(2)}`);
    }
    // the strongest lie on top
    this.layers.dots.append(...drawn.slice(0, 40).reverse().map((source) => this.dots.get(source).node));
    this.origin = place.origin;
  }

  #addDot(source) {
    const node = svgElement("circle", { "data-source": source });
    const line = svgElement("line");
    this.layers.dots.append(node);
    this.layers.lines.append(line);
    this.dots.set(source, { node, line, width: 0 });
  }

  #drawCentre({ origin: [x, y] }) {
    const text = cut(this.run.labels[this.shown.token]);
    const half = Math.max(13, textWidth(text, `600 14px ${css("--mono")}`) / 2 + 9);
    const box = { x: x - half, y: y - 14, width: 2 * half, height: 28, rx: 14 };
    this.taken.push([x - half - 3, y - 17, x + half + 3, y + 17]);
    this.layers.centre.replaceChildren(
      svgElement("rect", box),
      svgElement("text", { x, y, dy: "0.35em" }, text),
    );
  }

  // Names of the strongest sources, each beside its dot where nothing is in the way.
  #drawLabels(place, order) {
    const { shares, token } = this.shown;
    const family = css("--font");
    const named = order.filter((source) => shares[source] >= LEAST_LABELLED).slice(0, LABELLED);
    for (const source of named) {
      const [[x, y], r] = [this.dots.get(source).to, this.dots.get(source).size];
      this.taken.push([x - r, y - r, x + r, y + r]);
    }
    const labels = named.flatMap((source, n) => {
      const text = source === token ? "itself" : sourceText(this.run.labels[source]);
      const pull = percent(shares[source]);
      const width = textWidth(`${text} ${pull}`, `600 ${n ? 13 : 15}px ${family}`) + 4;
      const at = this.#freePlace(this.dots.get(source), width, n ? 17 : 20, place.origin);
      if (!at) return [];
      const label = svgElement(
        "g",
        { "data-source": source, tabindex: 0, role: "button", class: n ? "label" : "label first" },
        svgElement(
          "text",
          { x: at[0] + 2, y: at[1], dy: "0.35em" },
          text,
          svgElement("tspan", { dx: "0.35em" }, pull),
        ),
      );
      label.setAttribute("aria-label", `${this.run.labels[source]}, ${pull} of the pull, select it`);
      return [label];
    });
    this.layers.labels.replaceChildren(...labels);
  }

  // Where a text of this width can stand beside a dot, [left, middle]; null if nowhere.
  #freePlace({ to: [x, y], size }, width, height, origin) {
    const away = size + 4;
    const sides = [
      [x + away, y],
      [x - away - width, y],
      [x - width / 2, y - away - height / 2],
      [x - width / 2, y + away + height / 2],
      [x + away * 0.7, y - away - height / 4],
      [x + away * 0.7, y + away + height / 4],
      [x - away * 0.7 - width, y - away - height / 4],
      [x - away * 0.7 - width, y + away + height / 4],
    ];
    if (x < origin[0]) [sides[0], sides[1]] = [sides[1], sides[0]];
    for (const [left, middle] of sides) {
      const box = [left, middle - height / 2, left + width, middle + height / 2];
      const isInside =
        box[0] > 2 && box[1] > 26 && box[2] < this.size[0] - 2 && box[3] < this.size[1] - 2;
      if (!isInside || !isFree(box, this.taken)) continue;
      this.taken.push(box);
      return [left, middle];
    }
    return null;
  }

  // Moves dots and lines to their new places in so many milliseconds; 0 puts them there.
  #glide(duration) {
    cancelAnimationFrame(this.frame);
    const isAtOnce = !duration || calm.matches;
    if (isAtOnce) return this.#show(1);
    let start = null;
    const step = (now) => {
      start ??= now;
      const passed = Math.min(1, (now - start) / duration);
      this.#show(1 - (1 - passed) ** 3);
      if (passed < 1) this.frame = requestAnimationFrame(step);
    };
    this.#show(0);
    this.frame = requestAnimationFrame(step);
  }

  #show(share) {
    const [x, y] = this.origin;
    for (const dot of this.dots.values()) {
      const now = dot.from.map((from, axis) => from + (dot.to[axis] - from) * share);
      dot.now = now;
      dot.width = dot.fromWidth + (dot.toWidth - dot.fromWidth) * share;
      const [cx, cy] = now.map((value) => value.toFixed(1));
      dot.node.setAttribute("cx", cx);
      dot.node.setAttribute("cy", cy);
      if (dot.width < 0.05) {
        if (dot.hasLine) dot.line.setAttribute("stroke-width", 0);
        dot.hasLine = false;
        continue;
      }
      dot.hasLine = true;
      const line = { x1: cx, y1: cy, x2: x, y2: y, "stroke-width": dot.width.toFixed(2) };
      for (const [name, value] of Object.entries(line)) dot.line.setAttribute(name, value);
    }
    this.layers.labels.setAttribute("opacity", share ** 2);
    const { centre } = this.layers;
    const fall = this.shown.isPlaying ? (1 - share) * (y - 30) : 0;
    centre.setAttribute("transform", `translate(0 ${-fall})`);
    centre.setAttribute("opacity", this.shown.isPlaying ? Math.min(1, 0.15 + share) : 1);
  }

  // Begins with the sentence that holds the selected token, or goes on where it was stopped.
  play(isPlaying) {
    clearTimeout(this.timer);
    // one of two runs leads
    if (!isPlaying || this.run !== RUNS.find((run) => run.hasGravity)) return;
    const { run, actions } = this;
    const token = this.state.token.get(run);
    const isAtEnd = token + 1 >= run.count;
    const first = isAtEnd ? 0 : token === this.stoppedAt ? token : this.#sentenceStart(token);
    const seen = () => {
      const { view, layer, head, split } = this.state;
      return [view, layer, head, split, this.state.token.get(run)].join();
    };
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
    step(first);
  }

  #sentenceStart(token) {
    const { labels } = this.run;
    let first = token;
    while (first > 0 && !/[.!?⏎]$/.test(labels[first - 1])) first -= 1;
    return first;
  }

  svg() {
    return this.picture;
  }
}
