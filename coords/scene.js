// The map of one run in 3-D on a canvas: tokens, trails, pulls, labels, and the tooltip.

class Scene {
  static #most = 2000; // more tokens have no trails and no names, which would take too long
  static #names = [12, 20]; // the fewest, if there is room, and the most
  static #nearest = 6; // rings around the same token elsewhere
  static #reach = 14; // pixels from the pointer to the middle of a token

  constructor(run, actions) {
    Object.assign(this, { run, actions, camera: new Camera() });
    if (!run.hasGravity) {
      const textContent =
        "A vanilla transformer has no coordinates, so there is no map of its tokens. See Heads for what it looks at, and Next token for what it expects.";
      this.node = element("p", { className: "no-picture", textContent });
      return;
    }
    this.surface = element("canvas", { tabIndex: 0 });
    this.surface.setAttribute("role", "application");
    this.surface.setAttribute(
      "aria-label",
      `Map of ${plural(run.count, "token")} of ${run.name} in three dimensions. Shift with an arrow turns it, plus and minus zoom, 0 shows it from the start. The text beside it lists the tokens.`,
    );
    this.tooltip = element("div", { className: "tooltip", hidden: true });
    this.legend = element("p", { className: "legend" });
    const parts = [this.surface, this.legend, note(this.#axesInWords()), this.tooltip];
    this.node = element("section", { className: "scene" }, ...parts);
    // a model of characters: its tokens are drawn as letters
    const letters = run.labels.filter((label) => [...label].length === 1);
    this.isLetters = letters.length > 0.9 * run.count;
    this.ranked = this.#ranked();
    this.#listen();
  }

  #axesInWords() {
    const { axes, numCoords } = this.run;
    const drawn = axes[0].startsWith("t-SNE")
      ? "Axes from t-SNE, which keeps neighbours together but no distances"
      : "Axes: principal components (PC) of the places in all layers, with their share of the variance";
    const hidden = numCoords > 3 ? `; near here may be far in all ${numCoords} dimensions` : "";
    return `${drawn}${hidden}. Lines join places after the layer; each head measured before it, in a space of its own: see Orbit.`;
  }

  // The heaviest and the most surprising tokens in turn, each token once.
  #ranked() {
    const { mass, loss, tokens } = this.run;
    const [heavy, surprising] = [mass, loss].map((values) =>
      [...values.keys()].sort((a, b) => (values[b] ?? -1) - (values[a] ?? -1)),
    );
    const seen = new Set();
    return heavy
      .flatMap((one, n) => [one, surprising[n]])
      .filter((n) => !seen.has(tokens[n]) && seen.add(tokens[n]));
  }

  update(state) {
    if (!this.run.hasGravity) return;
    this.state = state;
    const names = ["ink", "card", "soft", "faint", "accent", "twin", "font"];
    this.ink = Object.fromEntries(names.map((name) => [name, css(`--${name}`)]));
    this.#mark();
    this.#drawLegend();
    this.hover(null);
    this.#draw();
  }

  // What does not depend on the camera: colours, sizes, and which tokens are marked and named.
  #mark() {
    const { run, state } = this;
    const { size } = massScale(run);
    const token = state.token.get(run);
    const base = Math.max(1.4, Math.min(5.5, 95 / Math.sqrt(run.count)));
    const pulls = run
      .pulls(run.layerOf(state.layer), state.head, token)
      .filter(([source]) => source !== token);
    const far = (twin) => run.distance(state.layer, token, twin);
    const twins = run.twins(token).map((twin) => [far(twin), twin]);
    twins.sort((a, b) => a[0] - b[0]);
    const first = [token, ...pulls.map(([source]) => source)];
    const taken = new Set(first.map((n) => run.tokens[n]));
    const others = this.isLetters || run.count > Scene.#most ? [] : this.ranked;
    Object.assign(this, { token, pulls });
    this.strong = new Set(first);
    this.twins = new Set(twins.slice(0, Scene.#nearest).map(([, twin]) => twin));
    this.colours = colouring(run, state.colour).colours;
    this.radii = run.mass.map((mass) => base * size(mass));
    this.named = [...first, ...others.filter((n) => !taken.has(run.tokens[n]))];
  }

  #draw() {
    const { surface, run, state } = this;
    const { clientWidth: width, clientHeight: height } = surface;
    if (!width || !height) return;
    const ratio = devicePixelRatio || 1;
    const size = [width, height].map((x) => Math.round(x * ratio));
    if (surface.width !== size[0]) surface.width = size[0];
    if (surface.height !== size[1]) surface.height = size[1];
    this.pen = surface.getContext("2d");
    this.pen.setTransform(ratio, 0, 0, ratio, 0, 0);
    this.pen.fillStyle = this.ink.card;
    this.pen.fillRect(0, 0, width, height);
    Object.assign(this.pen, { lineJoin: "round", lineCap: "round", textAlign: "center" });
    const frame = run.frame(state.at, state.isFit);
    const project = this.camera.projection(frame, width, height);
    Object.assign(surface.dataset, { camera: this.camera.text, middle: this.camera.middle });
    this.places = run.labels.map((_, token) => project(run.place(state.at, token)));
    const middles = this.#drawBox(project, frame);
    if (run.count <= Scene.#most && state.trails) this.#drawTrails(project);
    this.#drawPulls(project);
    this.#drawTokens();
    this.#drawAxisNames(middles, width, height);
    if (!this.isLetters) this.#drawNames(width, height);
  }

  #line(color, width, path, alpha = 1) {
    const { pen } = this;
    pen.beginPath();
    path();
    Object.assign(pen, { strokeStyle: color, lineWidth: width, globalAlpha: alpha });
    pen.stroke();
    pen.globalAlpha = 1;
  }

  #circle(x, y, radius, color) {
    this.pen.beginPath();
    this.pen.arc(x, y, radius, 0, 2 * Math.PI);
    this.pen.fillStyle = color;
    this.pen.fill();
  }

  // Text that can be read over what is below it.
  #write(text, x, y, color) {
    Object.assign(this.pen, { lineWidth: 3, strokeStyle: this.ink.card, fillStyle: color });
    this.pen.strokeText(text, x, y);
    this.pen.fillText(text, x, y);
  }

  // The edges of the box but for those that meet in the corner nearest the eye. Returns per axis
  // where its name stands: the middle of the lowest edge, for the upright one of the leftmost.
  #drawBox(project, { middle, half }) {
    const corners = Array.from({ length: 8 }, (_, n) =>
      project(middle.map((x, axis) => x + ((n >> axis) & 1 ? half[axis] : -half[axis]))),
    );
    const depths = corners.map(([, , depth]) => depth);
    const nearest = depths.indexOf(Math.max(...depths));
    const edges = [0, 1, 2].map((axis) =>
      [...corners.keys()].filter((n) => !((n >> axis) & 1)).map((n) => [n, n | (1 << axis)]),
    );
    this.#line(this.ink.faint, 1, () => {
      for (const [one, other] of edges.flat()) {
        if (one === nearest || other === nearest) continue;
        this.pen.moveTo(...corners[one]);
        this.pen.lineTo(...corners[other]);
      }
    });
    return edges.map((four, axis) => {
      const middles = four.map((ends) =>
        [0, 1].map((n) => (corners[ends[0]][n] + corners[ends[1]][n]) / 2),
      );
      const outside = ([x, y]) => (axis === 2 ? -x : y);
      return middles.reduce((best, at) => (outside(at) > outside(best) ? at : best));
    });
  }

  #drawAxisNames(middles, width, height) {
    this.pen.font = `12px ${this.ink.font}`;
    middles.forEach(([x, y], axis) => {
      const name = this.run.axes[axis].replace("component", "PC").replace(" of variance", "");
      const half = this.pen.measureText(name).width / 2 + 4;
      const isLeft = axis === 2 || x < width / 2;
      const left = Math.max(half, Math.min(width - half, isLeft ? x - half - 4 : x + half + 4));
      const down = Math.max(14, Math.min(height - 6, axis === 2 ? y : y + 14));
      this.#write(name, left, down, this.ink.soft);
    });
  }

  #trail(project, token) {
    const [x, y] = this.places[token];
    const passed = this.run.points.slice(0, Math.ceil(this.run.layerOf(this.state.at)));
    passed.forEach((points, n) => this.pen[n ? "lineTo" : "moveTo"](...project(points[token])));
    if (passed.length) this.pen.lineTo(x, y);
  }

  #drawTrails(project) {
    const trails = () => this.radii.forEach((_, token) => this.#trail(project, token));
    this.#line(this.ink.faint, 0.8, trails, Math.max(0.15, Math.min(0.4, 60 / this.run.count)));
  }

  // Lines to the sources, as wide as their shares, and the selected token's own trail.
  #drawPulls(project) {
    for (const [source, share] of this.pulls)
      this.#line(
        this.ink.accent,
        Math.max(1, 14 * share),
        () => {
          this.pen.moveTo(...this.places[this.token]);
          this.pen.lineTo(...this.places[source]);
        },
        0.8,
      );
    this.#line(this.ink.ink, 1.8, () => this.#trail(project, this.token));
  }

  // Back to front, the marked ones last; what is farther away is smaller and paler.
  #drawTokens() {
    const { pen, ink, places } = this;
    const order = [...places.keys()].sort((a, b) => places[a][2] - places[b][2]);
    const far = places[order[0]][2];
    const deep = places[order.at(-1)][2] - far || 1;
    const isMarked = (n) => this.strong.has(n) || this.twins.has(n);
    this.order = [...order.filter((n) => !isMarked(n)), ...order.filter(isMarked)];
    const larger = Math.sqrt(Math.max(1, this.camera.zoom));
    const isPlain = this.state.colour === "none";
    const palest = isPlain ? 0.4 : 0.7; // a colour must be told apart from others
    this.drawn = this.radii.map(
      (radius, n) => radius * places[n][3] * larger * (this.strong.has(n) ? 1.25 : 1),
    );
    for (const n of this.order) {
      const [x, y, depth] = places[n];
      const isPlainSource = isPlain && n !== this.token && this.strong.has(n);
      const color = isPlainSource ? ink.accent : this.colours[n];
      const alpha = isMarked(n) ? 1 : palest + ((1 - palest) * (depth - far)) / deep;
      if (this.isLetters) this.#drawLetter(n, color, alpha);
      else {
        this.#circle(x, y, this.drawn[n] + 0.8, ink.card);
        pen.globalAlpha = alpha;
        this.#circle(x, y, this.drawn[n], color);
      }
      pen.globalAlpha = 1;
      if (isMarked(n) && !isPlainSource) this.#drawRing(n);
    }
  }

  #drawLetter(n, color, alpha) {
    const [x, y] = this.places[n];
    const isStrong = this.strong.has(n);
    const size = Math.round(2.6 * this.drawn[n] + (isStrong ? 3 : 0));
    this.pen.font = `${isStrong ? 700 : 400} ${size}px ${this.ink.font}`;
    this.pen.globalAlpha = alpha;
    this.#write(this.run.labels[n], x, y + 0.35 * size, color);
  }

  #drawRing(n) {
    const [x, y] = this.places[n];
    const { ink, accent, twin } = this.ink;
    const color = n === this.token ? ink : this.twins.has(n) ? twin : accent;
    const radius = this.drawn[n] + (this.isLetters ? 5 : 3.5);
    this.#line(color, n === this.token ? 2 : 1.5, () => this.pen.arc(x, y, radius, 0, 2 * Math.PI));
  }

  // A label without marks for the spaces beside it.
  #name(token) {
    const label = this.run.labels[token];
    return cut(label.replaceAll("␣", " ").trim() || label);
  }

  // Names that overlap none before; those of tokens that are not marked are spread out, unless
  // that leaves only a few.
  #drawNames(width, height) {
    const [boxes, tokens] = [[], new Set()];
    const isNear = (x, y) => (other) =>
      Math.hypot(this.places[other][0] - x, this.places[other][1] - y) < 45;
    const name = (token, isSpread) => {
      const [x, y] = this.places[token];
      const isStrong = this.strong.has(token);
      if (isSpread && !isStrong && [...tokens].some(isNear(x, y))) return;
      this.pen.font = `${token === this.token ? "700 15px" : "12px"} ${this.ink.font}`;
      const text = this.#name(token);
      const half = this.pen.measureText(text).width / 2;
      const gap = this.drawn[token] + 4;
      const spots = [
        [x, y - gap - 2],
        [x + gap + half, y + 4],
        [x - gap - half, y + 4],
        [x, y + gap + 11],
      ];
      const boxOf = ([at, down]) => [at - half - 2, down - 13, at + half + 2, down + 4];
      const fits = (box) =>
        box[0] > 0 && box[1] > 0 && box[2] < width && box[3] < height && isFree(box, boxes);
      const spot = spots.find((one) => fits(boxOf(one)));
      if (!spot) return;
      boxes.push(boxOf(spot));
      tokens.add(token);
      this.#write(text, ...spot, isStrong ? this.ink.ink : this.ink.soft);
    };
    const [fewest, most] = Scene.#names;
    for (const token of this.named) if (tokens.size < most) name(token, true);
    for (const token of this.named)
      if (tokens.size < fewest && !tokens.has(token)) name(token, false);
  }

  #drawLegend() {
    const { run, state } = this;
    const { title, low, high, ramp } = colouring(run, state.colour);
    const scale = massScale(run);
    const part = (...children) => element("span", {}, ...children);
    const sample = (className, style) => element("i", { className, style });
    const { size } = run.frame(state.layer, state.isFit);
    const bar = sample("ramp", { background: `linear-gradient(90deg, ${ramp})` });
    const sizes = `size: mass, ${number(scale.low, 2)} to ${number(scale.high, 2)}`;
    this.legend.replaceChildren(
      ...(state.colour === "none" ? [] : [part(low, bar, `${high} ${title}`)]),
      part(state.colour === "mass" ? "size: mass too" : sizes),
      ...(this.pulls.length ? [part(sample("pull"), "pull")] : []),
      ...(this.twins.size ? [part(sample("twin"), "same token")] : []),
      ...(size < 0.995 ? [part(`${number(1 / size, 2)} × larger than the widest layer`)] : []),
      ...(state.layer > run.numLayers ? [part(`layer ${run.numLayers}, its last`)] : []),
      ...(run.count > Scene.#most ? [part("too many tokens for trails and names")] : []),
    );
  }

  // The token at a place of the canvas, or null: of those under it the one on top, or the nearest.
  #tokenAt(x, y) {
    let [found, best] = [null, Infinity];
    this.order?.forEach((token, n) => {
      const far = Math.hypot(this.places[token][0] - x, this.places[token][1] - y);
      const rank = far <= this.drawn[token] + 1 ? -1 - n : far;
      if (rank < Scene.#reach && rank < best) [found, best] = [token, rank];
    });
    return found;
  }

  #listen() {
    const { surface, run, actions } = this;
    const under = ({ clientX, clientY }) => {
      const { left, top } = surface.getBoundingClientRect();
      return this.#tokenAt(clientX - left, clientY - top);
    };
    this.camera.follow(surface, this.#turned, () => actions.set({}));
    surface.addEventListener("click", (event) => {
      const token = under(event);
      if (this.camera.travelled < 5 && token !== null) actions.select(run, token);
    });
    surface.addEventListener("pointermove", (event) => {
      if (event.buttons || event.pointerType === "touch") return;
      const token = under(event);
      surface.classList.toggle("pointing", token !== null);
      if (token !== this.hovered) actions.hover(run, token);
    });
    surface.addEventListener("pointerleave", () => actions.hover(run, null));
  }

  // Draws at most once per frame.
  #turned = () => {
    this.hover(null);
    cancelAnimationFrame(this.waiting);
    this.waiting = requestAnimationFrame(() => this.#draw());
  };

  // Show what a token is beside it, or nothing.
  hover(token) {
    this.hovered = token;
    if (!this.tooltip) return;
    this.tooltip.hidden = token === null || !this.places;
    if (this.tooltip.hidden) return;
    const { run, state, tooltip } = this;
    const [x, y] = this.places[token];
    const pulls = run.pulls(run.layerOf(state.layer), state.head, token).slice(0, 3);
    const quiet = run.quietOf(run.layerOf(state.layer), state.head, token);
    const loss = run.loss[token] === null ? "none: it comes first" : number(run.loss[token]);
    const facts = `position ${token} · mass ${number(run.mass[token])} · loss ${loss}`;
    const names = pulls.flatMap(([source, share], n) => [
      n ? ", " : "pulled by ",
      chip(run.labels[source]),
      ` ${percent(share)}`,
    ]);
    if (quiet) names.push(`${pulls.length ? ", " : ""}quiet ${percent(quiet)}`);
    tooltip.replaceChildren(
      chip(run.labels[token]),
      element("div", { textContent: facts }),
      element("div", {}, ...names),
    );
    const { offsetWidth, offsetHeight } = tooltip;
    const left = Math.min(x - offsetWidth / 2, this.node.clientWidth - offsetWidth - 4);
    const above = y - this.drawn[token] - offsetHeight - 8;
    tooltip.style.left = `${Math.max(4, left)}px`;
    tooltip.style.top = `${above > 0 ? above : y + this.drawn[token] + 10}px`;
  }

  keys(event) {
    if (!this.run.hasGravity || !this.camera.key(event)) return false;
    this.#turned();
    return true;
  }

  hash() {
    return this.camera.text;
  }

  restore(text) {
    this.camera.restore(text);
    if (this.state) this.#draw();
  }

  canvas() {
    return this.surface;
  }
}
