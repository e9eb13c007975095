// Colours, and what a colour can stand for.

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
const DASHES = ["", "7 4", "2 3", "7 3 2 3"]; // as in stroke-dasharray
const headLine = (head) => ({
  color: OKABE_ITO[head % OKABE_ITO.length] ?? css("--ink"),
  dash: DASHES[Math.floor(head / OKABE_ITO.length) % DASHES.length],
  width: 2,
});

const channels = (hex) => [1, 3, 5].map((n) => parseInt(hex.slice(n, n + 2), 16));
const mixed = (one, two, share) => {
  const [from, to] = [one, two].map(channels);
  return `rgb(${from.map((c, n) => Math.round(c + (to[n] - c) * share)).join(",")})`;
};
// The dark end cannot be seen on a dark page, nor the light end on a light one: each is left out,
// and high values are what stands out most on either.
const shade = (share) => {
  const [low, high] = dark.matches ? [0.22, 1] : [0.94, 0];
  const at = (low + (high - low) * share) * (CIVIDIS.length - 1);
  return mixed(CIVIDIS[Math.floor(at)], CIVIDIS[Math.ceil(at)], at % 1);
};
// Lighter than 1 is green, heavier purple, 1 a grey that can be seen on either page. Orange and
// blue are left to pulls and rings.
const massShade = (share) => {
  const [light, heavy] = dark.matches ? ["#7be39a", "#e3a4f5"] : ["#0b5a2a", "#6a1b7d"];
  const grey = "#959595";
  return share < 0.5 ? mixed(light, grey, 2 * share) : mixed(grey, heavy, 2 * share - 1);
};

// The scale of the masses in the text, the same for all runs and views: of their ratio to 1, since a
// field is proportional to the mass, so twice is as far from 1 as half. It spans at least 10 %.
// share(mass) is 0 at `low`, 0.5 at 1 and 1 at `high`; size(mass) the radius beside that of mass 1.
const LEAST_LOW = 0.9;
const MOST_HIGH = 100; // a mass may be as good as 0
let keptScale = { runs: null };
const massScale = () => {
  if (keptScale.runs === RUNS) return keptScale.scale;
  const masses = RUNS.flatMap((run) => run.mass ?? []);
  const ratio = (mass) => Math.min(MOST_HIGH, Math.max(mass, 1 / mass));
  const high = masses.reduce((most, mass) => Math.max(most, ratio(mass)), 1 / LEAST_LOW);
  const share = (mass) => Math.max(0, Math.min(1, 0.5 + Math.log(mass) / Math.log(high) / 2));
  const size = (mass) => 2 ** (2 * share(mass) - 1);
  keptScale = { runs: RUNS, scale: { low: 1 / high, high, share, size } };
  return keptScale.scale;
};

const plural = (count, word) => `${plain.format(count)} ${word}${count === 1 ? "" : "s"}`;

// What a colour can stand for: the title, the values (null: none), and how one is written.
const COLOURS = {
  mass: {
    title: "mass, 1 in the middle",
    of: (run) => run.mass ?? run.tokens.map(() => null),
    tick: (x) => number(x),
  },
  surprise: { title: "surprise: loss in nats", of: (run) => run.loss, tick: (x) => x.toFixed(2) },
  position: {
    title: "position in the text",
    of: (run) => run.tokens.map((_, n) => n),
    tick: (x) => plain.format(x),
  },
  frequency: {
    title: "times in the text that was counted (log)",
    of: (run) => run.counts.map((count) => Math.log10(Math.max(count, 0.5))),
    tick: (x) => plain.format(x < 0 ? 0 : Math.round(10 ** x)),
  },
};

// The colour of every token of a run, on one scale for all runs: { title, low, high, colours, ramp }
// with `ramp` the colours from low to high. "none" is the page's text colour.
const colouring = (run, name) => {
  if (!COLOURS[name]) {
    const ink = css("--ink");
    return { title: "", low: "", high: "", colours: run.tokens.map(() => ink), ramp: [ink, ink] };
  }
  const { title, of, tick } = COLOURS[name];
  const known = RUNS.flatMap(of).filter((x) => x !== null);
  const scale = massScale();
  const [low, high] =
    name === "mass"
      ? [scale.low, scale.high]
      : [Math.min, Math.max].map((best) => known.reduce((a, b) => best(a, b), known[0] ?? 0));
  const shareOf = name === "mass" ? scale.share : (x) => (x - low) / (high - low || 1);
  const shadeOf = name === "mass" ? massShade : shade;
  const faint = css("--faint");
  return {
    ...{ title, low: tick(low), high: tick(high) },
    colours: of(run).map((x) => (x === null ? faint : shadeOf(shareOf(x)))),
    ramp: [0, 0.25, 0.5, 0.75, 1].map(shadeOf),
  };
};
