// The map of one run in 3-D: tokens, trails, pull lines, and the tooltip.

const PICK_PIXELS = 14;
const TRACES = { trails: 0, tokens: 1, trail: 2, twins: 3, sources: 4, selected: 5, pull: 6 };
const AXES = ["x", "y", "z"];

class Scene {
  constructor(run, root, actions) {
    Object.assign(this, { run, actions });
    this.node = root.querySelector(".scene");
    this.tooltip = root.querySelector(".tooltip");
    this.legend = root.querySelector(".legend");
    const masses = run.mass;
    const [low, high] = [Math.min(...masses), Math.max(...masses)];
    this.sizes = masses.map((mass) => 5 + 11 * ((mass - low) / (high - low || 1)));
    this.node.setAttribute(
      "aria-label",
      `Map of ${run.count} tokens of ${run.name} in three dimensions. The text beside it lists them.`,
    );
  }

  async draw(state) {
    const line = (width) => ({
      type: "scatter3d",
      mode: "lines",
      x: [],
      y: [],
      z: [],
      hoverinfo: "skip",
      line: { width },
    });
    const marks = (mode, marker, extra) => ({
      type: "scatter3d",
      mode,
      x: [],
      y: [],
      z: [],
      hoverinfo: "skip",
      marker,
      ...extra,
    });
    const traces = [
      line(1.5),
      marks("markers", { size: this.sizes, opacity: 1, line: { width: 0.6 } }),
      line(5),
      marks("markers", { symbol: "circle-open", size: 11, line: { width: 1.5 } }),
      marks("markers+text", { size: 5 }, { text: [], textposition: "top center" }),
      marks(
        "markers+text",
        { symbol: "circle-open", size: 18, line: { width: 3 } },
        { text: [], textposition: "top center" },
      ),
      ...Array.from({ length: this.run.numStored }, () => line(2)),
    ];
    this.state = state;
    this.#paint(traces);
    this.#put(traces, this.#moving(state));
    this.#put(traces, this.#marked(state));
    await Plotly.newPlot(this.node, traces, this.#layout(), {
      displayModeBar: false,
      responsive: true,
      scrollZoom: true,
      showTips: false,
    });
    this.#listen();
    this.#drawLegend(state);
  }

  #layout() {
    const { middle, half } = this.run.frame(this.state.at, this.state.isFit);
    const longest = Math.max(...half);
    const axis = (n) => ({
      title: { text: this.#axisTitle(n), font: { size: 11, color: css("--soft") } },
      range: [middle[n] - half[n], middle[n] + half[n]],
      showspikes: false,
      showbackground: false,
      gridcolor: css("--line"),
      zeroline: false,
      showticklabels: false,
      linecolor: css("--line"),
    });
    return {
      scene: {
        ...Object.fromEntries(AXES.map((name, n) => [`${name}axis`, axis(n)])),
        aspectmode: "manual",
        aspectratio: Object.fromEntries(AXES.map((name, n) => [name, (1.1 * half[n]) / longest])),
        camera: this.camera ?? this.#firstCamera(),
        dragmode: "turntable",
      },
      font: { family: css("--font"), color: css("--ink") },
      paper_bgcolor: "rgba(0,0,0,0)",
      margin: { l: 0, r: 0, t: 0, b: 0 },
      showlegend: false,
      hovermode: false,
      uirevision: "kept",
    };
  }

  #isNarrow() {
    return this.node.clientWidth < 480;
  }

  #axisTitle(axis) {
    // a long title would leave the picture when the axes turn: the legend explains them
    return escaped(this.run.axes[axis].replace("component ", "PC ").replace(" of variance", ""));
  }

  #firstCamera() {
    const far = this.#isNarrow() ? 1.3 : 1;
    return { eye: { x: 1.2 * far, y: 1.2 * far, z: 0.75 * far }, center: { x: 0, y: 0, z: -0.1 } };
  }

  // The traces that depend on the layer but not on the selection.
  #moving({ at, trails }) {
    const { run } = this;
    const tokens = { x: [], y: [], z: [] };
    const lines = { x: [], y: [], z: [] };
    for (let token = 0; token < run.count; token++) {
      const here = run.place(at, token);
      AXES.forEach((name, n) => tokens[name].push(here[n]));
      if (trails) this.#addTrail(lines, token, at, here, at % 1 ? 1 : Infinity);
    }
    return { [TRACES.trails]: lines, [TRACES.tokens]: tokens };
  }

  // A moving token draws only its last step: whole trails would be too slow on many computers.
  #addTrail(lines, token, at, here, steps = Infinity) {
    const layer = Math.ceil(this.run.layerOf(at));
    const passed = this.run.points.slice(Math.max(0, layer - steps), layer);
    AXES.forEach((name, n) =>
      lines[name].push(...passed.map((layer) => layer[token][n]), here[n], null),
    );
  }

  // The traces of the selected token.
  #marked({ at, shown, head, selected }) {
    const { run } = this;
    const nothing = { x: [], y: [], z: [], text: [] };
    const places = (tokens) => {
      const found = tokens.map((token) => run.place(at, token));
      return Object.fromEntries(AXES.map((name, n) => [name, found.map((place) => place[n])]));
    };
    const token = selected?.get(run);
    const marked = {};
    for (const [name, trace] of Object.entries(TRACES))
      if (trace >= TRACES.trail && name !== "pull") marked[trace] = nothing;
    for (let n = 0; n < run.numStored; n++) marked[TRACES.pull + n] = { x: [], y: [], z: [] };
    if (token === undefined) return marked;
    const pulls = run.pulls(shown, head, token);
    const sources = pulls.map(([source]) => source).filter((source) => source !== token);
    const trail = { x: [], y: [], z: [] };
    this.#addTrail(trail, token, at, run.place(at, token));
    marked[TRACES.trail] = trail;
    marked[TRACES.twins] = places(run.twins(token).filter((twin) => !sources.includes(twin)));
    marked[TRACES.sources] = {
      ...places(sources),
      text: sources.map((source) => (at % 1 ? "" : tagless(run.labels[source]))),
    };
    marked[TRACES.selected] = {
      ...places([token]),
      text: [`<b>${tagless(run.labels[token])}</b><br> `],
    };
    pulls.forEach(([source, weight], n) => {
      const ends = source === token ? nothing : places([token, source]);
      marked[TRACES.pull + n] = { ...ends, width: Math.max(1.5, 26 * Math.sqrt(weight)) };
    });
    return marked;
  }

  #put(traces, changes) {
    for (const [trace, { width, ...places }] of Object.entries(changes)) {
      Object.assign(traces[trace], places);
      if (width) traces[trace].line.width = width;
    }
  }

  #paint(traces) {
    const { state } = this;
    const [accent, ink, faint] = ["--accent", "--ink", "--faint"].map(css);
    const isSelected = state.selected?.get(this.run) !== undefined;
    traces[TRACES.trails].line.color = faint;
    traces[TRACES.trails].opacity = isSelected ? 0.15 : 0.5;
    traces[TRACES.tokens].marker.color = colouring(this.run, state.colour).colours;
    traces[TRACES.tokens].marker.opacity = isSelected ? 0.6 : 1;
    traces[TRACES.tokens].marker.line.color = css("--page");
    traces[TRACES.trail].line.color = ink;
    traces[TRACES.twins].marker.color = css("--twin");
    traces[TRACES.sources].marker.color = accent;
    traces[TRACES.sources].textfont = { color: ink, size: 13 };
    traces[TRACES.selected].marker.color = ink;
    traces[TRACES.selected].textfont = { color: ink, size: 16 };
    for (let n = 0; n < this.run.numStored; n++) traces[TRACES.pull + n].line.color = accent;
  }

  // Draw everything again; the camera stays.
  update(state) {
    this.state = state;
    this.#drawLegend(state);
    this.hideTooltip();
    if (!this.#glplot()) return;
    const traces = this.node.data;
    this.#paint(traces);
    this.#put(traces, this.#moving(state));
    this.#put(traces, this.#marked(state));
    this.camera = this.node._fullLayout.scene._scene.getCamera();
    Plotly.react(
      this.node,
      traces.map((trace) => ({ ...trace })),
      this.#layout(),
    );
  }

  // None if the browser has no WebGL: Plotly says so in place of the map, and the rest works.
  #glplot() {
    return this.node._fullLayout?.scene?._scene?.glplot;
  }

  #drawLegend({ colour }) {
    const { title, low, high } = colouring(this.run, colour);
    const [first, second] = this.legend.querySelectorAll("span");
    [first.textContent, second.textContent] = [low, high];
    this.legend.querySelector("i").style.background =
      `linear-gradient(to right, ${[0, 0.25, 0.5, 0.75, 1].map(shade).join(",")})`;
    const masses = [Math.min(...this.run.mass), Math.max(...this.run.mass)].map((mass) =>
      number(mass),
    );
    const { size } = this.run.frame(this.state.shown, this.state.isFit);
    const larger =
      size < 0.995 ? ` · drawn ${number(1 / size, 2)} × larger than the widest layer` : "";
    const last =
      this.state.shown > this.run.numLayers ? ` · at layer ${this.run.numLayers}, its last` : "";
    const isPca = this.run.axes[0].startsWith("component");
    const axes = isPca ? " · axes: principal components of all layers, share of variance" : "";
    this.legend.querySelector("b").textContent =
      `colour: ${title} · size: mass, ${masses.join(" to ")}${larger}${last}${axes}`;
  }

  // [x, y, depth] of every token on the screen, x and y in pixels of the scene.
  screen() {
    if (!this.#glplot()) return [];
    const scene = this.node._fullLayout.scene._scene;
    const { model, view, projection } = scene.glplot.cameraParams;
    const times = (m, v) =>
      [0, 1, 2, 3].map((i) => m[i] * v[0] + m[4 + i] * v[1] + m[8 + i] * v[2] + m[12 + i] * v[3]);
    const { clientWidth: width, clientHeight: height } = this.node;
    return Array.from({ length: this.run.count }, (_, token) => {
      const place = this.run.place(this.state.at, token);
      const point = [...place.map((x, n) => x * scene.dataScale[n]), 1];
      const [x, y, depth, w] = times(projection, times(view, times(model, point)));
      return [((x / w + 1) / 2) * width, ((1 - y / w) / 2) * height, depth / w];
    });
  }

  // The token under the pointer, or null; near tokens win over far ones, the front over the back.
  tokenUnder(event) {
    const box = this.node.getBoundingClientRect();
    const [left, top] = [event.clientX - box.left, event.clientY - box.top];
    let [found, best] = [null, Infinity];
    this.screen().forEach(([x, y, depth], token) => {
      const far = Math.hypot(x - left, y - top);
      const reach = Math.max(PICK_PIXELS, this.sizes[token] / 2 + 3);
      const rank = far / reach + depth;
      if (far <= reach && rank < best) [found, best] = [token, rank];
    });
    return found;
  }

  #listen() {
    let [down, waiting] = [null, false];
    this.node.addEventListener(
      "pointerdown",
      (event) => {
        down = [event.clientX, event.clientY];
        this.hideTooltip();
      },
      true,
    );
    this.node.addEventListener(
      "click",
      (event) => {
        const moved =
          down === null ? 0 : Math.hypot(event.clientX - down[0], event.clientY - down[1]);
        if (moved > 4) return;
        const token = this.tokenUnder(event);
        this.actions.select(this.run, token);
        if (token !== null) this.showTooltip(token);
      },
      true,
    );
    this.node.addEventListener(
      "pointermove",
      (event) => {
        if (event.buttons || waiting) return;
        waiting = true;
        requestAnimationFrame(() => {
          waiting = false;
          const token = this.tokenUnder(event);
          this.node.classList.toggle("pointing", token !== null);
          if (token === null) this.hideTooltip();
          else this.showTooltip(token);
        });
      },
      true,
    );
    this.node.addEventListener("pointerleave", () => this.hideTooltip());
  }

  showTooltip(token) {
    const { run, state } = this;
    if (!this.#glplot()) return;
    const [x, y] = this.screen()[token];
    const loss =
      run.loss[token] === null ? "none: it comes first" : `${number(run.loss[token])} nats`;
    const pulls = run.pulls(state.shown, state.head, token).slice(0, 3);
    const quiet = run.quietOf(state.shown, state.head, token);
    this.tooltip.replaceChildren(
      chip(run.labels[token]),
      element("div", {
        textContent: `position ${token} · mass ${number(run.mass[token])} · loss ${loss}`,
      }),
      element(
        "div",
        {},
        ...(pulls.length ? ["pulled by "] : quiet === null ? ["nothing has pulled yet"] : []),
        ...pulls.flatMap(([source, weight], n) => [
          n ? ", " : "",
          chip(run.labels[source]),
          ` ${percent(weight)}`,
        ]),
        ...(quiet === null ? [] : [`${pulls.length ? ", " : ""}quiet ${percent(quiet)}`]),
      ),
    );
    this.tooltip.hidden = false;
    const { clientWidth: width } = this.node;
    const { offsetWidth, offsetHeight } = this.tooltip;
    const top = this.node.offsetTop + y;
    this.tooltip.style.left = `${Math.max(4, Math.min(x - offsetWidth / 2, width - offsetWidth - 4))}px`;
    this.tooltip.style.top = `${top - offsetHeight - 14 > 0 ? top - offsetHeight - 14 : top + 16}px`;
  }

  hideTooltip() {
    this.tooltip.hidden = true;
  }

  // Move the camera by angles in radians and a factor of its distance.
  move(turn, tilt, zoom) {
    if (!this.#glplot()) return;
    const camera = this.node._fullLayout.scene._scene.getCamera();
    const { x, y, z } = camera.eye;
    const far = Math.hypot(x, y, z) * zoom;
    const around = Math.atan2(y, x) + turn;
    const up = Math.max(-1.5, Math.min(1.5, Math.asin(z / Math.hypot(x, y, z)) + tilt));
    camera.eye = {
      x: far * Math.cos(up) * Math.cos(around),
      y: far * Math.cos(up) * Math.sin(around),
      z: far * Math.sin(up),
    };
    Plotly.relayout(this.node, { "scene.camera": camera });
    this.hideTooltip();
  }
}
