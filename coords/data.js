// The data of the page, unpacked, and the law by which any pull is computed from it.

const TINY = 1e-30; // in place of a background: what nothing pulls gets 0
const LEAST_SHARE = 1e-4; // of the pulls that are listed
const NEAR_ZERO = 1e-6; // added to the published law's squared distance

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

// Where the heads' tokens look from (q) and pull from (k), and the pulls that follow by the law;
// layers from 1. The formulas are those of gravity/law.py and gravity/published.py.
class Law {
  constructor(run, given) {
    const { kind, mass, count, numHeads } = run;
    Object.assign(this, { ...given, kind, mass, count, numHeads });
    this.q = unpacked(given.q, Int16Array);
    this.k = given.k === null ? this.q : unpacked(given.k, Int16Array);
  }

  // The numbers of a head, and where its row of q for a token, and of k for the text, begin.
  #head(layer, head, token) {
    const start = ((layer - 1) * this.numHeads + head) * this.count * this.width;
    const numbers = this.heads[layer - 1][head];
    const scale = this.scale[layer - 1][head];
    return { ...numbers, scale, start, at: start + token * this.width };
  }

  // Squared distances in space of the sources up to a token.
  #space2(layer, head, token) {
    const { start, at, scale } = this.#head(layer, head, token);
    const { q, k, width } = this;
    const found = new Float64Array(token + 1);
    for (let source = 0, n = start; source <= token; source++) {
      let sum = 0;
      for (let c = 0; c < width; c++) {
        const difference = q[at + c] - k[n++];
        sum += difference * difference;
      }
      found[source] = sum * scale * scale;
    }
    return found;
  }

  // The time between a token and each source as a distance, negative if less than the offset.
  #time(layer, head, token) {
    const { timeScale, timeOffset } = this.heads[layer - 1][head];
    return Float64Array.from({ length: token + 1 }, (_, source) =>
      this.kind === "newton" ? timeScale * (token - source - timeOffset) : 0,
    );
  }

  // `distance` of each source up to a token and its parts `space` and `time`, and the direction
  // (x, y) of the source from the token along the head's first two principal axes.
  orbit(layer, head, token) {
    const { start, at, scale } = this.#head(layer, head, token);
    const space2 = this.#space2(layer, head, token);
    const time = this.#time(layer, head, token).map(Math.abs);
    const along = (axis) =>
      space2.map((_, source) =>
        axis < this.width
          ? (this.k[start + source * this.width + axis] - this.q[at + axis]) * scale
          : 0,
      );
    return {
      distance: space2.map((x, source) => Math.sqrt(x + time[source] ** 2)),
      space: space2.map(Math.sqrt),
      time,
      x: along(0),
      y: along(1),
    };
  }

  // Each source's share of the pull on a token.
  shares(layer, head, token) {
    if (this.kind === "newton") return this.#newton(layer, head, token);
    const scores = this.kind === "published" ? this.#published : this.#dotProducts;
    return this.#softmax(scores.call(this, layer, head, token), this.heads[layer - 1][head].sink);
  }

  #newton(layer, head, token) {
    const { background, radius } = this.heads[layer - 1][head];
    const time = this.#time(layer, head, token);
    const fields = this.#space2(layer, head, token).map((space2, source) => {
      const r2 = space2 + time[source] ** 2;
      const field = (this.massInValue ? 1 : this.mass[source]) * (1 + r2) ** -this.exponent;
      if (this.cutoff === "hard") return r2 <= radius ** 2 ? field : 0;
      return this.cutoff === "soft" ? field * Math.max(0, 1 - r2 / radius ** 2) ** 2 : field;
    });
    const sum = fields.reduce((a, b) => a + b, background ?? TINY);
    return fields.map((field) => field / sum);
  }

  #published(layer, head, token) {
    const { gamma, bias, radius } = this.heads[layer - 1][head];
    return this.#space2(layer, head, token).map((r2, source) => {
      const masses = this.massInValue ? 1 : this.mass[token] * this.mass[source];
      const score = (bias - gamma / (r2 + NEAR_ZERO)) * masses;
      if (this.cutoff === "hard") return r2 <= radius ** 2 ? score : -Infinity;
      return this.cutoff === "soft" ? score * Math.max(0, 1 - r2 / radius ** 2) : score;
    });
  }

  #dotProducts(layer, head, token) {
    const { start, at, scale, slope } = this.#head(layer, head, token);
    const { q, k, width } = this;
    return new Float64Array(token + 1).map((_, source) => {
      let sum = 0;
      for (let c = 0; c < width; c++) sum += q[at + c] * k[start + source * width + c];
      return sum * scale * scale - (slope ?? 0) * (token - source);
    });
  }

  // `sink` is the score of no token, null without one.
  #softmax(scores, sink) {
    const highest = scores.reduce((a, b) => Math.max(a, b), sink ?? -Infinity);
    const weights = scores.map((score) => Math.exp(score - highest));
    const rest = Number.isFinite(sink) ? Math.exp(sink - highest) : 0;
    const sum = weights.reduce((a, b) => a + b, rest);
    return weights.map((weight) => weight / sum);
  }
}

class Run {
  constructor(given) {
    Object.assign(this, given);
    this.count = this.labels.length;
    this.hasGravity = given.kind !== "vanilla";
    if (this.hasGravity) this.#measurePicture();
  }

  // Large arrays are unpacked once they are needed.
  #unpack(name, make) {
    this.unpackedOf ??= {};
    return (this.unpackedOf[name] ??= make());
  }

  #law() {
    return this.#unpack("law", () => new Law(this, this.attention));
  }

  #measurePicture() {
    this.boxes = this.points.map(boxAround);
    const [low, high] = boxAround(this.boxes.flat());
    this.box = [low, high];
    this.half = low.map((x, axis) => (1.06 * (high[axis] - x)) / 2 || 0.5);
    // the share of the whole picture that each layer fills
    this.fills = this.boxes.map(
      ([from, to]) =>
        Math.max(...from.map((x, axis) => (1.06 * (to[axis] - x)) / 2 / this.half[axis])) || 1,
    );
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

  // Every source's share of the pull on a token, by a head or as the "mean" over heads: one for
  // each token up to it, all 0 before the first layer.
  shares(layer, head, token) {
    const at = this.layerOf(layer);
    if (at < 1) return new Float64Array(token + 1);
    if (head !== "mean" && head < this.numHeads) return this.#law().shares(at, head, token);
    const mean = new Float64Array(token + 1);
    for (let n = 0; n < this.numHeads; n++)
      this.#law()
        .shares(at, n, token)
        .forEach((share, source) => (mean[source] += share / this.numHeads));
    return mean;
  }

  // [source, share] of the strongest sources.
  pulls(layer, head, token, most = 8) {
    return [...this.shares(layer, head, token).entries()]
      .filter(([, share]) => share > LEAST_SHARE)
      .sort((a, b) => b[1] - a[1])
      .slice(0, most);
  }

  // The share of the background, or of a vanilla transformer's sink; null without one, and before
  // the first layer.
  quietOf(layer, head, token) {
    const { background, sink } = this.attention.heads[0][0];
    if ((background ?? sink ?? null) === null || this.layerOf(layer) < 1) return null;
    const sum = this.shares(layer, head, token).reduce((a, b) => a + b, 0);
    return Math.max(0, 1 - sum);
  }

  // How far each source is from a token for a head (a number); null for a vanilla transformer and
  // before the first layer.
  orbit(layer, head, token) {
    const at = this.layerOf(layer);
    return this.hasGravity && at >= 1 ? this.#law().orbit(at, head, token) : null;
  }

  // [label, chance, id] of the likeliest tokens after a token, read after a layer.
  next(layer, token) {
    return this.#predicted("lens", this.layerOf(layer) * this.count + token, this.numLayers + 1);
  }

  // The same at the end, with one head off; null if that was not computed.
  without(layer, head, token) {
    if (this.off === null) return null;
    return this.#predicted("off", this.#offRow(layer, head, token), this.numLayers * this.numHeads);
  }

  // The loss of the token after `token` with one head off, in nats; null as above.
  lossWithout(layer, head, token) {
    if (this.off === null || token + 1 >= this.count) return null;
    const losses = this.#unpack("losses", () => unpacked(this.off.loss, Uint16Array));
    return losses[this.#offRow(layer, head, token)] / 1000;
  }

  #offRow(layer, head, token) {
    return ((this.layerOf(layer) - 1) * this.numHeads + head) * this.count + token;
  }

  // A row of "lens" or "off", which has so many rows per token.
  #predicted(name, row, perToken) {
    const { ids, chances } = this.#unpack(name, () => ({
      ids: unpacked(this[name].ids, this.names.length > 65536 ? Uint32Array : Uint16Array),
      chances: unpacked(this[name].chances, Uint16Array),
    }));
    const kept = ids.length / (perToken * this.count);
    return Array.from({ length: kept }, (_, n) => {
      const id = ids[row * kept + n];
      return [this.names[id], chances[row * kept + n] / 65535, this.nameIds[id]];
    });
  }

  // The loss of a token given those before it, in nats; null for the first.
  surprise(token) {
    return this.loss[token];
  }

  // Distance of two tokens in all coordinates z, not only along the three axes of the picture; null
  // for a vanilla transformer.
  distance(layer, one, other) {
    if (!this.hasGravity) return null;
    const z = this.#unpack("z", () => unpacked(this.z, Int16Array));
    const start = this.layerOf(layer) * this.count;
    let sum = 0;
    for (let c = 0; c < this.numCoords; c++) {
      const difference =
        z[(start + one) * this.numCoords + c] - z[(start + other) * this.numCoords + c];
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
