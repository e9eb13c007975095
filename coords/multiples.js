// What each head does, measured on this text, and the pictures of its pull, small and large.

const MEASURED_ROWS = 128; // tokens, evenly spaced, by which heads are told apart
const MOST_ROWS = 1024; // rows of a heatmap that are computed; of a longer text evenly spaced ones
const SEEN = 0.25; // a head is named for what gets this share of its pull
const OFTEN = 2; // and this many times what the distance alone would give it

// Places that a head may look for. `copies` is the measure of an induction head (Olsson et al. 2022,
// https://arxiv.org/abs/2209.11895): the places right after earlier occurrences of the same token.
const LANDMARKS = {
  copies: "copies: looks for what followed a token like this",
  same: "looks for the same token before",
  first: "looks at the first token",
  line: "looks at the start of the line",
};

const pullWord = (run) => (run.hasGravity ? "pull" : "attention");

// How a canvas shows the pull of one head: the button, and what is to be seen.
const MODES = {
  distance: [
    "by distance",
    "Bars: the share that comes from 0, 1, 2, 3–4, 5–8, 9–16 … tokens back, mean over this text.",
  ],
  row: [
    "the selected token",
    "From left to right the whole text: the higher, the larger the share of the pull on the selected token (square root).",
  ],
  all: [
    "every token",
    "From top to bottom a row per token, from left to right a column per source: the more colour, the larger the share (square root).",
  ],
};

// The colours of a share of the pull, as 256 times r, g, b, a, from none to all of it.
let [heatTheme, heatBytes] = [null, null];
function heat() {
  const theme = `${css("--card")} ${css("--accent")} ${css("--ink")}`;
  if (theme !== heatTheme) {
    const ink = element("canvas", { width: 256, height: 1 }).getContext("2d");
    const ramp = ink.createLinearGradient(0.5, 0, 255.5, 0);
    ramp.addColorStop(0, css("--card"));
    ramp.addColorStop(0.6, css("--accent"));
    ramp.addColorStop(1, css("--ink"));
    ink.fillStyle = ramp;
    ink.fillRect(0, 0, 256, 1);
    [heatTheme, heatBytes] = [theme, ink.getImageData(0, 0, 256, 1).data];
  }
  return heatBytes;
}
const heatOf = (share) => {
  const at = 4 * Math.round(255 * Math.sqrt(Math.min(1, share)));
  return `rgb(${heat()
    .slice(at, at + 3)
    .join(",")})`;
};

// A canvas at the screen's resolution, cleared; what comes back draws in CSS pixels.
function blank(canvas, width, height) {
  const dense = window.devicePixelRatio || 1;
  canvas.width = Math.round(width * dense);
  canvas.height = Math.round(height * dense);
  canvas.style.height = `${height}px`;
  const ink = canvas.getContext("2d");
  ink.setTransform(dense, 0, 0, dense, 0, 0);
  return ink;
}

// The share of a head's pull from each distance in tokens, mean over the text.
function profileOf(run, layer, head) {
  const { back, of } = run.pull;
  const profile = new Float64Array(run.count);
  back.forEach((from, n) => profile.fill(of[layer - 1][head][n], from, back[n + 1] ?? run.count));
  return profile;
}

// Sums of a profile over the distances 0, 1, 2, 3–4, 5–8, and so on.
function binned(profile) {
  const bins = [];
  for (
    let from = 0, end = 1;
    from < profile.length;
    [from, end] = [end, end < 2 ? end + 1 : 2 * end - 1]
  )
    bins.push(profile.slice(from, end).reduce((a, b) => a + b, 0));
  return bins;
}

// Every token's shares, as n × n cells with the largest share in each.
function gridOf(run, layer, head, size) {
  const { count } = run;
  const n = Math.min(count, size);
  const cells = new Float32Array(n * n);
  for (let token = 0; token < count; token += Math.ceil(count / MOST_ROWS)) {
    const shares = run.shares(layer, head, token);
    const start = Math.floor((token * n) / count) * n;
    for (let source = 0; source <= token; source++) {
      const cell = start + Math.floor((source * n) / count);
      if (shares[source] > cells[cell]) cells[cell] = shares[source];
    }
  }
  return { n, cells };
}

function paintGrid(ink, { n, cells }, x, y, width, height) {
  const picture = new ImageData(n, n);
  const [pixels, colours] = [picture.data, heat()].map((bytes) => new Uint32Array(bytes.buffer));
  for (let cell = 0; cell < pixels.length; cell++)
    pixels[cell] = colours[Math.round(255 * Math.sqrt(Math.min(1, cells[cell])))];
  const made = element("canvas", { width: n, height: n });
  made.getContext("2d").putImageData(picture, 0, 0);
  ink.imageSmoothingEnabled = false;
  ink.drawImage(made, x, y, width, height);
}

// What each head of a run looks for, counted over the text.
class Measures {
  constructor(run) {
    this.run = run;
    this.found = new Map();
    this.rows = [];
    const earlier = new Map();
    let line = 0;
    const step = Math.ceil(run.count / MEASURED_ROWS);
    run.tokens.forEach((id, token) => {
      const before = earlier.get(id) ?? [];
      if (token && (run.count - 1 - token) % step === 0)
        this.rows.push({
          token,
          copies: before.map((place) => place + 1).filter((place) => place < token),
          same: [...before],
          first: [0],
          line: line && line < token ? [line] : [],
        });
      earlier.set(id, before);
      before.push(token);
      if (run.labels[token].endsWith("⏎")) line = token + 1;
    });
  }

  isKnown(layer, head) {
    return this.found.has(`${layer} ${head}`);
  }

  // Per landmark its share of the head's pull, and what the same distances get on the average; both
  // over the tokens that have such a place before them. Null if none has.
  seen(layer, head) {
    const key = `${layer} ${head}`;
    if (!this.found.has(key)) this.found.set(key, this.#measure(layer, head));
    return this.found.get(key);
  }

  #measure(layer, head) {
    const profile = profileOf(this.run, layer, head);
    const within = profile.slice();
    for (let far = 1; far < within.length; far++) within[far] += within[far - 1];
    const sums = Object.fromEntries(Object.keys(LANDMARKS).map((name) => [name, [0, 0, 0]]));
    for (const row of this.rows) {
      const shares = this.run.shares(layer, head, row.token);
      const total = shares.reduce((a, b) => a + b, 0);
      for (const [name, sum] of Object.entries(sums)) {
        if (row[name].length) sum[0] += total;
        for (const place of row[name]) {
          sum[1] += shares[place];
          sum[2] += (total * profile[row.token - place]) / (within[row.token] || 1);
        }
      }
    }
    for (const [name, [total, share, chance]] of Object.entries(sums))
      sums[name] = total ? { share: share / total, chance: chance / total } : null;
    return sums;
  }
}

const isMarked = (seen) => seen !== null && seen.share >= OFTEN * seen.chance;

// What a head does: [words, share of its pull or null].
function headWords(run, row, seen) {
  if (row.quiet >= 0.8) return ["quiet", row.quiet];
  if (row.most_distance === null) return ["nothing reaches", null];
  const found = [
    [
      row.most_distance ? `looks ${plain.format(row.most_distance)} back` : "looks at itself",
      row.most_share,
    ],
    ["looks one back", row.one_back],
    ...Object.entries(LANDMARKS)
      .filter(([name]) => isMarked(seen[name]))
      .map(([name, words]) => [words, seen[name].share]),
  ];
  const [words, share] = found.reduce((a, b) => (b[1] > a[1] ? b : a));
  if (share >= SEEN) return [words === "looks 1 back" ? "looks one back" : words, share];
  if (row.within >= (run.count - 1) / 2) return ["far and wide", null];
  return [`the last ${plain.format(row.within + 1)} tokens`, null];
}
const WORD_RULES =
  `A head is named for the place that gets most of its pull, if that is at least ${percent(SEEN)}: itself, a distance, ` +
  "the place right after an earlier occurrence of the same token (copies), an earlier occurrence, the first token of the text, the start of the line; " +
  `the last four only if they get at least ${OFTEN} times what a head with the same pull by distance would give them. ` +
  "Otherwise it is far and wide if 90 % of its pull needs more than half of the text, or looks at the last tokens that give 90 %. Quiet: at least 80 % goes to the background. " +
  `Counted over at most ${MEASURED_ROWS} tokens of this text, evenly spaced.`;

// One head, small: a canvas and a few words; pressed, it is shown large.
class Small {
  constructor(run, row, open) {
    Object.assign(this, { run, row, drawn: "", bars: binned(profileOf(run, row.layer, row.head)) });
    this.canvas = element("canvas");
    this.words = element("span", { className: "does" });
    this.node = element(
      "button",
      { type: "button", className: "small", tabIndex: -1, onclick: open },
      element("span", {}, bold(`${row.layer}·${row.head + 1}`), " ", this.words),
      this.canvas,
    );
  }

  // Nothing is drawn again that stands there already.
  // `most` is the share of the highest bar by distance of all heads.
  draw(mode, token, width, height, most) {
    const key = [mode, mode === "row" ? token : "", width, height, dark.matches].join(" ");
    if (key === this.drawn) return;
    this.drawn = key;
    const ink = blank(this.canvas, width, height);
    const { run, row } = this;
    if (mode === "all") {
      this.grid ??= gridOf(run, row.layer, row.head, 128);
      return paintGrid(ink, this.grid, 0, 0, width, height);
    }
    const bars = mode === "row" ? run.shares(row.layer, row.head, token) : this.bars;
    const room = width / (mode === "row" ? run.count : bars.length);
    ink.fillStyle = css("--accent");
    bars.forEach((share, n) => {
      const tall = height * (mode === "row" ? Math.sqrt(share) : share / most);
      if (tall < 0.2) return;
      const gap = mode === "row" ? 0 : 1;
      ink.fillRect(n * room, height - tall, Math.max(1, room - gap), tall);
    });
  }

  // Whether drawing it would take long.
  isHeavy(mode) {
    return mode === "all" && !this.grid;
  }

  tell(seen) {
    const [words, share] = headWords(this.run, this.row, seen);
    const short = words.split(":")[0].replace(/^looks (at |for )?/, "");
    this.words.textContent = share === null ? short : `${short} ${percent(share)}`;
    const name = `${headName(this.row)}: ${words}${share === null ? "" : ` (${percent(share)})`}`;
    this.node.title = name;
    this.node.setAttribute("aria-label", name);
  }
}

// A bar per token along the text, up for a positive value and down for a negative one; a click
// selects.
class Strip {
  constructor(label, pick, told) {
    this.canvas = element("canvas", { className: "strip" });
    this.canvas.setAttribute("role", "img");
    this.canvas.setAttribute("aria-label", label);
    this.canvas.onclick = (event) => pick(this.#under(event));
    this.canvas.onpointermove = (event) => told(this.#under(event));
    this.canvas.onpointerleave = () => told(null);
  }

  // `selected` is the index of the value that is marked; where a pixel has several values, the
  // largest is drawn.
  draw(values, selected, height = 64) {
    const width = this.canvas.clientWidth;
    const ink = blank(this.canvas, width, height);
    const [low, high] = [Math.min(0, ...values), Math.max(0, ...values)];
    const unit = (height - 2) / (high - low || 1);
    const room = width / values.length;
    this.values = values;
    ink.fillStyle = `color-mix(in srgb, ${css("--twin")} 25%, transparent)`;
    ink.fillRect(selected * room - 2, 0, Math.max(room, 1) + 4, height);
    const [up, down] = [css("--accent"), css("--twin")];
    values.forEach((value, n) => {
      ink.fillStyle = value < 0 ? down : up;
      const from = 1 + (high - Math.max(0, value)) * unit;
      ink.fillRect(n * room, from, Math.max(1, room - (room > 3)), Math.abs(value) * unit);
    });
  }

  #under(event) {
    const box = this.canvas.getBoundingClientRect();
    const [room, x] = [box.width / this.values.length, event.clientX - box.left];
    // a bar may be thinner than a pixel: the largest within one pixel of the pointer
    const from = Math.max(0, Math.floor((x - 1) / room));
    const end = Math.min(
      this.values.length - 1,
      room > 3 ? Math.floor(x / room) : Math.floor((x + 1) / room),
    );
    let best = room > 3 ? end : from;
    for (let n = best; n <= end; n++)
      if (Math.abs(this.values[n]) > Math.abs(this.values[best])) best = n;
    return best;
  }
}
