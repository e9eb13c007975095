// The picture of the orbit view: rings of equal distance, a dot per source, as thick a line as its
// pull is strong, and the names of the strongest.

const MOST_DOTS = 600; // of a longer text, half of them are the strongest sources
const NAMED_DOTS = 8;
const NAMED_IN_SMALL = 5;
const LEAST_NAMED = 0.004; // of the pull
const LEAST_LINE = 0.0015;
const RINGS = [0.3, 1, 3, 10, 30, 100, 300, 1000, 3000, 10000];
const RINGS_BETWEEN = [2, 5, 20, 50, 200, 500, 2000, 5000];
const GLIDE = 320; // milliseconds
const FALL = 450;
const DOT = 5.5; // the radius of mass 1
const LINE = 15; // the width of a pull of 100 %

const clamped = (x, low, high) => Math.max(low, Math.min(high, x));
const boxOf = (x, y, width, height) => [x, y, x + width, y + height];
const mixOf = (one, other, share) =>
  `rgb(${one.map((c, n) => Math.round(c + (other[n] - c) * share)).join(" ")})`;
const nameOf = (label) => cut(label.replace(/^␣(?=.)/, ""));

// Of thousands of sources, strongest first, those that are drawn: the strongest and a sample.
const drawnOf = (order) => {
  if (order.length <= MOST_DOTS) return order;
  const others = order.slice(MOST_DOTS / 2).sort((a, b) => a - b);
  const step = Math.ceil(others.length / (MOST_DOTS / 2));
  return [...order.slice(0, MOST_DOTS / 2), ...others.filter((_, n) => n % step === 0)];
};

class OrbitPicture {
  // `name`: an id that the page does not have yet.
  constructor(name) {
    this.name = name;
    this.dots = new Map(); // source → its circle, its line and where they are
    this.layers = {};
    for (const name of ["rings", "lines", "dots", "names", "centre"])
      this.layers[name] = svgElement("g", { class: name });
    this.node = svgElement("svg", { class: "sky", role: "group" }, ...Object.values(this.layers));
  }

  // `shown`: run, layer, head, token, what `run.orbit` and `run.shares` give, the `angles` of the
  // sources, whether it `isSplit` into two axes, and the `title`.
  draw(shown, isFalling) {
    const before = this.shown?.token;
    const size = [this.node.clientWidth, this.node.clientHeight].map((x) => Math.max(240, x));
    const isResized = String(size) !== String(this.size);
    Object.assign(this, { shown, size, isFalling });
    this.node.setAttribute("viewBox", `0 0 ${size.join(" ")}`);
    const { orbit, shares, angles, isSplit } = shown;
    this.place = isSplit ? new Axes(orbit, size) : new Circles(orbit, size, angles);
    // smaller dots in a small or a full picture
    this.unit = DOT * clamped(this.place.radius / 230, 0.7, 1) * (shares.length > 250 ? 0.8 : 1);
    const order = [...shares.keys()].sort((a, b) => shares[b] - shares[a]);
    this.drawn = drawnOf(order);
    // boxes where no name can stand, and where none should: on dots and on lines
    [this.taken, this.onDots, this.onLines] = [[], [], []];
    this.#drawRings();
    this.#drawDots(before);
    this.#drawCentre();
    this.#drawNames(order);
    this.#glide(isResized ? 0 : isFalling ? FALL : GLIDE);
  }

  #drawRings() {
    const { place, size, shown } = this;
    const far = place.farthest;
    const rings = this.#ringsUpTo(far);
    const text = (x, y, words, more) => svgElement("text", { x, y, dy: "0.35em", ...more }, words);
    const { radius } = shown.run.attention.heads[shown.layer - 1][shown.head];
    const isCut = radius !== null && shown.run.attention.cutoff !== "none" && radius < far;
    const numbers = [
      ...(isCut ? [[radius, `radius ${number(radius, 2)}`]] : []),
      ...rings.map((ring) => [ring, plainDistance(ring)]),
    ].flatMap(([ring, words]) => place.ticks(ring).map((at) => [...at, words]));
    const [x, y] = place.origin;
    this.layers.rings.replaceChildren(
      this.#gradient(),
      svgElement("circle", { cx: x, cy: y, r: place.glow, fill: `url(#${this.name})` }),
      svgElement("path", { class: "edges", d: place.edges }),
      ...rings.map((ring) => svgElement("path", { d: place.ring(ring) })),
      ...(isCut ? [svgElement("path", { class: "cutoff", d: place.ring(radius) })] : []),
      ...numbers
        .filter(([x, y, words]) => {
          const half = 4 + 3.5 * Math.max(3, words.length);
          const box = boxOf(x - half, y - 7, 2 * half, 14);
          return isFree(box, this.taken) && this.taken.push(box);
        })
        .map(([x, y, words]) => text(x, y, words)),
      text(12, 18, shown.title, { class: "caption title" }),
      ...place
        .captions(size)
        .map(([x, y, words, anchor]) =>
          text(x, y, words, { class: "caption", "text-anchor": anchor }),
        ),
    );
  }

  // The glow around the token: near is strong.
  #gradient() {
    const stop = (offset, opacity) =>
      svgElement("stop", { offset, "stop-color": css("--accent"), "stop-opacity": opacity });
    return svgElement("radialGradient", { id: this.name }, stop(0, 0.1), stop(1, 0));
  }

  // Rings of 1 and 3 and their tenfolds, and others where there is room.
  #ringsUpTo(far) {
    const { radius } = this.place;
    const out = (distance) => (radius * softened(distance)) / softened(far);
    const rings = [];
    for (const [some, gap] of [
      [RINGS, 14],
      [RINGS_BETWEEN, 36],
    ])
      rings.push(
        ...some.filter(
          (x) => x <= far && rings.concat(0).every((ring) => Math.abs(out(ring) - out(x)) > gap),
        ),
      );
    return rings;
  }

  #drawDots(before) {
    const { place, shown } = this;
    const { run, orbit, shares, token } = shown;
    const { size } = massScale();
    const [inSpace, inTime] = ["--twin", "--accent"].map((name) => channels(css(name)));
    const kept = new Set(this.drawn);
    for (const [source, dot] of this.dots) {
      if (kept.has(source)) continue;
      dot.circle.remove();
      dot.line.remove();
      this.dots.delete(source);
    }
    for (const source of this.drawn) {
      const to = place.at(source);
      const dot = this.dots.get(source) ?? this.#addDot(source);
      // a new token falls from the centre to its distance, others come from outside
      const isInner = source === token || source === before;
      const outside = to.map((x, axis) => 1.25 * x - 0.25 * place.origin[axis]);
      dot.from = dot.now ?? (isInner ? place.origin : outside);
      dot.to = to;
      dot.size = this.unit * size(run.mass[source]);
      const strength = Math.sqrt(shares[source]);
      [dot.fromWidth, dot.toWidth] = [dot.width, shares[source] < LEAST_LINE ? 0 : LINE * strength];
      const colour = mixOf(inSpace, inTime, lateness(orbit, source));
      const paint = (element, name, opacity) => {
        element.setAttribute(name, colour);
        element.setAttribute("opacity", opacity.toFixed(2));
      };
      dot.circle.setAttribute("r", dot.size.toFixed(2));
      paint(dot.circle, "fill", clamped(0.28 + 2.4 * strength, 0, 1));
      paint(dot.line, "stroke", clamped(0.15 + strength, 0, 0.85));
    }
    // the strongest lie on top
    const top = this.drawn.slice(0, 40).reverse();
    this.layers.dots.append(...top.map((source) => this.dots.get(source).circle));
  }

  #addDot(source) {
    const circle = svgElement("circle", { "data-source": source });
    const line = svgElement("line", { "data-source": source });
    this.layers.dots.append(circle);
    this.layers.lines.append(line);
    const dot = { circle, line, width: 0 };
    this.dots.set(source, dot);
    return dot;
  }

  #drawCentre() {
    const [x, y] = this.place.origin;
    const text = nameOf(this.shown.run.labels[this.shown.token]);
    const half = Math.max(14, textWidth(text, `600 15px ${css("--font")}`) / 2 + 10);
    const box = { x: x - half, y: y - 14, width: 2 * half, height: 28, rx: 14 };
    this.taken.push(boxOf(x - half - 3, y - 17, 2 * half + 6, 34));
    this.layers.centre.replaceChildren(
      svgElement("rect", box),
      svgElement("text", { x, y, dy: "0.35em" }, text),
    );
  }

  // The strongest sources by name, each beside its dot where nothing is in the way.
  #drawNames(order) {
    const { run, shares, token } = this.shown;
    const { origin } = this.place;
    const family = css("--font");
    const isNamed = (source, n) => shares[source] >= (n < 3 ? LEAST_LINE / 10 : LEAST_NAMED);
    const most = this.place.radius < 180 ? NAMED_IN_SMALL : NAMED_DOTS;
    const named = order.slice(0, most).filter(isNamed);
    for (const source of named) {
      const { to, size } = this.dots.get(source);
      this.onDots.push(boxOf(to[0] - size, to[1] - size, 2 * size, 2 * size));
      for (let part = 0.05; part < 0.95; part += 0.05) {
        const [x, y] = to.map((value, axis) => value + (origin[axis] - value) * part);
        this.onLines.push(boxOf(x - 3, y - 3, 6, 6));
      }
    }
    const names = named.flatMap((source, n) => {
      const text = source === token ? "itself" : nameOf(run.labels[source]);
      const pull = percent(shares[source]);
      const width = textWidth(`${text}  ${pull}`, `600 ${n ? 13 : 15}px ${family}`) + 4;
      const box = this.#freeBox(this.dots.get(source), width, n ? 17 : 20, !n);
      if (!box) return [];
      this.taken.push(box);
      const name = svgElement(
        "g",
        { "data-source": source, tabindex: 0, role: "button", class: n ? "name" : "name first" },
        ...this.#leader(this.dots.get(source), box),
        svgElement(
          "text",
          { x: box[0] + 2, y: (box[1] + box[3]) / 2, dy: "0.35em" },
          text,
          svgElement("tspan", { dx: "0.35em" }, pull),
        ),
      );
      name.setAttribute("aria-label", `${run.labels[source]}, ${pull} of the pull: select it`);
      return [name];
    });
    this.layers.names.replaceChildren(...names);
  }

  // The box beside a dot in which a text of this size can stand, null if there is none: close by on
  // the side away from the centre, else farther out, else on a line. One that is needed may also
  // hide other dots, as few as can be.
  #freeBox({ to: [x, y], size }, width, height, isNeeded) {
    const [out, down] = [x, y].map((value, axis) => (value < this.place.origin[axis] ? -1 : 1));
    // a box whose near corner or side is so far from the dot
    const beside = (across, up) =>
      boxOf(
        across === 0 ? x - width / 2 : across > 0 ? x + across : x + across - width,
        y + up - height / 2,
        width,
        height,
      );
    const [away, aslant] = [size + 4, 0.7 * size + 3];
    const [above, raised] = [away + height / 2, aslant + height / 3];
    const close = [
      beside(out * away, 0),
      ...[down, -down].map((side) => beside(out * aslant, side * raised)),
      ...[down, -down].map((side) => beside(0, side * above)),
      ...[down, -down].map((side) => beside(-out * aslant, side * raised)),
      beside(-out * away, 0),
    ];
    const far = [24, 44, 66, 90].flatMap((across) =>
      [0, 1, -1, 2, -2, 3, -3, 4, -4].map((up) => beside(out * across, down * up * 16)),
    );
    const [right, bottom] = this.size;
    const isInside = (box) =>
      box[0] > 4 && box[1] > 28 && box[2] < right - 4 && box[3] < bottom - 4;
    const all = [...close, ...far].filter((box) => isInside(box) && isFree(box, this.taken));
    const clear = all.filter((box) => isFree(box, this.onDots));
    const hidden = (box) => this.onDots.filter((dot) => !isFree(box, [dot])).length;
    const fewest = isNeeded && !clear.length ? all.sort((a, b) => hidden(a) - hidden(b)) : [];
    return clear.find((box) => isFree(box, this.onLines)) ?? clear[0] ?? fewest[0] ?? null;
  }

  // A thin line from a dot to a name that stands farther away.
  #leader({ to: [x, y], size }, box) {
    const [toX, toY] = [clamped(x, box[0], box[2]), clamped(y, box[1] + 5, box[3] - 5)];
    if (Math.hypot(toX - x, toY - y) < size + 12) return [];
    return [svgElement("path", { class: "leader", d: `M${x} ${y}L${toX} ${toY}` })];
  }

  // Moves dots and lines to their new places in so many milliseconds; 0 puts them there.
  #glide(duration) {
    cancelAnimationFrame(this.frame);
    if (!duration || calm.matches) return this.#show(1);
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
    const [x, y] = this.place.origin;
    for (const dot of this.dots.values()) {
      dot.now = dot.from.map((from, axis) => from + (dot.to[axis] - from) * share);
      dot.width = dot.fromWidth + (dot.toWidth - dot.fromWidth) * share;
      const [cx, cy] = dot.now.map((value) => value.toFixed(1));
      dot.circle.setAttribute("cx", cx);
      dot.circle.setAttribute("cy", cy);
      const isDrawn = dot.width > 0.05;
      if (isDrawn !== dot.isDrawn)
        dot.line.setAttribute("visibility", isDrawn ? "visible" : "hidden");
      dot.isDrawn = isDrawn;
      if (!isDrawn) continue;
      const line = { x1: cx, y1: cy, x2: x, y2: y, "stroke-width": dot.width.toFixed(2) };
      for (const [name, value] of Object.entries(line)) dot.line.setAttribute(name, value);
    }
    this.layers.names.setAttribute("opacity", share ** 2);
    const height = this.isFalling ? (1 - share) * (y - 30) : 0;
    this.layers.centre.setAttribute("transform", `translate(0 ${-height})`);
    this.layers.centre.setAttribute("opacity", this.isFalling ? Math.min(1, 0.15 + share) : 1);
  }

  // The source under the pointer, or close to it for a finger; null if there is none.
  sourceAt({ target, clientX, clientY, pointerType }) {
    const name = target.closest?.(".name");
    if (name) return Number(name.dataset.source);
    const box = this.node.getBoundingClientRect();
    let [found, least] = [null, pointerType === "touch" ? 24 : 10];
    for (const [source, { to, size }] of this.dots) {
      const away = Math.hypot(to[0] + box.left - clientX, to[1] + box.top - clientY) - size;
      if (away < least) [found, least] = [source, away];
    }
    return found;
  }
}
