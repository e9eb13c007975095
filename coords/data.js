// The data of the page, unpacked, and the colours.

const GIVEN = JSON.parse($("data").textContent);

const unpacked = (base64, ArrayType) => {
  const text = atob(base64);
  const bytes = new Uint8Array(text.length);
  for (let i = 0; i < text.length; i++) bytes[i] = text.charCodeAt(i);
  return new ArrayType(bytes.buffer);
};

// The lowest and highest coordinates of points, per axis.
const boxAround = (points) =>
  [Math.min, Math.max].map((extreme) =>
    [0, 1, 2].map((axis) =>
      points.reduce((found, point) => extreme(found, point[axis]), points[0][axis]),
    ),
  );

class Run {
  constructor(given) {
    Object.assign(this, given);
    this.count = this.labels.length;
    this.z = unpacked(given.z, Int16Array);
    this.sources = unpacked(given.sources, Uint16Array);
    this.weights = unpacked(given.weights, Uint16Array);
    this.quiet = given.quiet === null ? null : unpacked(given.quiet, Uint16Array);
    this.boxes = this.points.map(boxAround);
    const [low, high] = boxAround(this.boxes.flat());
    this.box = [low, high];
    this.half = low.map((x, axis) => (1.06 * (high[axis] - x)) / 2 || 0.5);
    // the share of the whole picture that each layer fills
    this.fills = this.boxes.map(
      ([from, to]) =>
        Math.max(...from.map((x, axis) => (1.06 * (to[axis] - x)) / 2 / this.half[axis])) || 1,
    );
    this.isUneven = Math.min(...this.fills) < 0.4;
  }

  // Middle and half width of the picture per axis: of all layers, or fitted to the layer `at`,
  // which lies between two layers during play.
  frame(at, isFit) {
    const middleOf = ([low, high]) => low.map((x, axis) => (x + high[axis]) / 2);
    if (!isFit) return { middle: middleOf(this.box), half: this.half, size: 1 };
    const [before, after] = [Math.floor, Math.ceil].map((round) => round(this.layerOf(at)));
    const share = this.layerOf(at) - before;
    const [from, to] = [before, after].map((layer) => middleOf(this.boxes[layer]));
    const size = this.fills[before] ** (1 - share) * this.fills[after] ** share;
    return {
      middle: from.map((x, axis) => x + (to[axis] - x) * share),
      half: this.half.map((x) => x * size),
      size,
    };
  }

  layerOf(layer) {
    return Math.min(layer, this.numLayers);
  }

  // The point of a token; between two layers it moves on a straight line.
  place(layer, token) {
    const at = this.layerOf(layer);
    const before = Math.floor(at);
    const [from, to] = [this.points[before][token], this.points[Math.ceil(at)][token]];
    return from.map((x, axis) => x + (to[axis] - x) * (at - before));
  }

  // Where the pulls of a head, or of "mean", on a token are; below 0 before the first layer.
  #row(layer, head, token) {
    const index = this.layerOf(layer) - 1;
    const which = head === "mean" || head >= this.numHeads ? this.numHeads : head;
    return (index * (this.numHeads + 1) + which) * this.count + token;
  }

  // The background's share in a row of pulls; null without a background and before the first layer.
  quietOf(layer, head, token) {
    const row = this.#row(layer, head, token);
    return this.quiet === null || row < 0 ? null : this.quiet[row] / 65535;
  }

  // [source, weight] of the strongest sources of a head, or of "mean".
  pulls(layer, head, token) {
    const row = this.#row(layer, head, token);
    const found = [];
    if (row < 0) return found;
    for (let n = row * this.numStored; n < (row + 1) * this.numStored; n++) {
      if (this.weights[n]) found.push([this.sources[n], this.weights[n] / 65535]);
    }
    return found;
  }

  // Distance of two tokens in all coordinates z, not only along the three axes of the picture.
  distance(layer, one, other) {
    const start = this.layerOf(layer) * this.count;
    let sum = 0;
    for (let c = 0; c < this.numCoords; c++) {
      const difference =
        this.z[(start + one) * this.numCoords + c] - this.z[(start + other) * this.numCoords + c];
      sum += difference * difference;
    }
    return Math.sqrt(sum) * this.zScale;
  }

  // The other places of the same token in the text.
  twins(token) {
    const same = [];
    for (let n = 0; n < this.count; n++)
      if (n !== token && this.tokens[n] === this.tokens[token]) same.push(n);
    return same;
  }

  // The token that holds this character of the text.
  tokenAt(character) {
    let found = 0;
    for (let n = 0; n < this.count && this.starts[n] <= character; n++) found = n;
    return found;
  }
}

const RUNS = GIVEN.runs.map((given) => new Run(given));
const DEEPEST = Math.max(...RUNS.map((run) => run.numLayers));
const dark = matchMedia("(prefers-color-scheme: dark)");
const calm = matchMedia("(prefers-reduced-motion: reduce)");
const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

// Cividis (Nuñez, Anderton and Renslow 2018) is readable with any colour vision.
const CIVIDIS = [
  "#00224e",
  "#123570",
  "#3b496c",
  "#575d6d",
  "#707173",
  "#8a8678",
  "#a59c74",
  "#c3b369",
  "#e1cc55",
  "#fee838",
];
// Okabe and Ito 2008; in place of black (null) the page's own text colour.
const OKABE_ITO = [
  "#0072b2",
  "#e69f00",
  "#009e73",
  "#d55e00",
  "#56b4e9",
  "#cc79a7",
  "#f0e442",
  null,
];
const DASHES = ["solid", "dash", "dot", "dashdot"];
const headLine = (head) => ({
  color: OKABE_ITO[head % OKABE_ITO.length] ?? css("--ink"),
  dash: DASHES[Math.floor(head / OKABE_ITO.length) % DASHES.length],
  width: 2,
});

const channels = (hex) => [1, 3, 5].map((n) => parseInt(hex.slice(n, n + 2), 16));
// The dark end cannot be seen on a dark page, nor the light end on a light one: each is left out.
const shade = (share) => {
  const [low, high] = dark.matches ? [0.22, 1] : [0, 0.94];
  const at = (low + (high - low) * share) * (CIVIDIS.length - 1);
  const [one, two] = [CIVIDIS[Math.floor(at)], CIVIDIS[Math.ceil(at)]].map(channels);
  return `rgb(${one.map((c, n) => Math.round(c + (two[n] - c) * (at % 1))).join(",")})`;
};

const plural = (count, word) => `${plain.format(count)} ${word}${count === 1 ? "" : "s"}`;

// What a colour can stand for: the title, the values (null: none), and how one is written.
const COLOURS = {
  mass: { title: "mass", of: (run) => run.mass, tick: (x) => number(x) },
  position: {
    title: "position in the text",
    of: (run) => run.mass.map((_, n) => n),
    tick: (x) => plain.format(x),
  },
  frequency: {
    title: "times in the text that was counted (log)",
    of: (run) => run.counts.map((count) => Math.log10(Math.max(count, 0.5))),
    tick: (x) => plain.format(x < 0 ? 0 : Math.round(10 ** x)),
  },
  loss: { title: "loss in nats", of: (run) => run.loss, tick: (x) => number(x) },
};

const colouring = (run, name) => {
  const { title, of, tick } = COLOURS[name];
  const values = of(run);
  const known = values.filter((x) => x !== null);
  const [low, high] = [Math.min(...known), Math.max(...known)];
  const shares = values.map((x) => (x === null ? null : (x - low) / (high - low || 1)));
  return {
    title,
    low: tick(low),
    high: tick(high),
    colours: shares.map((x) => (x === null ? css("--faint") : shade(x))),
  };
};

// Plotly's 3-D text reads tags but no entities: a space of no width after "<" breaks a tag.
const tagless = (label) => cut(label).replaceAll("<", "<\u200b");
// Plotly's charts read tags and entities.
const escaped = (text) => text.replace(/[&<>"']/g, (c) => `&#${c.charCodeAt(0)};`);
