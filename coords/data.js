// The data of the page, unpacked.

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

// What the page was given. The live page gives its data anew for every text.
let GIVEN, RUNS, DEEPEST;
const readRuns = (given) => {
  GIVEN = given;
  RUNS = given.runs.map((one) => new Run(one));
  DEEPEST = Math.max(0, ...RUNS.map((run) => run.numLayers));
};
readRuns(JSON.parse($("data").textContent));
