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
