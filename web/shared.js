"use strict";
// What both pages show: tokens as people read them, numbers, and the list of what pulls a token.

const $ = (id) => document.getElementById(id);

const plain = new Intl.NumberFormat("en", { maximumFractionDigits: 0 });
const number = (x, digits = 3) => {
  if (x === null || x === undefined) return "none";
  if (x === 0) return "0";
  if (Math.abs(x) < 0.0001) return x.toExponential(1);
  return Math.abs(x) >= 100 ? plain.format(x) : x.toPrecision(digits);
};
const percent = (x) => {
  if (x > 0 && x < 0.0005) return "< 0.1 %";
  return x >= 0.0995 ? `${Math.round(100 * x)} %` : `${(100 * x).toFixed(1)} %`;
};

// Only `append` and `textContent` put text into the page: a stranger's vocabulary may hold HTML.
const element = (name, properties = {}, ...children) => {
  const made = document.createElement(name);
  const { dataset, style, ...others } = properties;
  Object.assign(made, others);
  Object.assign(made.dataset, dataset);
  for (const [key, value] of Object.entries(style ?? {})) made.style.setProperty(key, value);
  made.append(...children);
  return made;
};
const heading = (textContent) => element("h3", { textContent });
const note = (textContent) => element("p", { className: "note", textContent });
const bold = (textContent) => element("b", { textContent });
const context = (textContent) => element("span", { className: "context", textContent });

// A label whose marks for spaces and line ends are paler than its letters.
const tokenText = (label) =>
  label
    .split(/([␣⏎⇥])/)
    .filter(Boolean)
    .map((part) =>
      /[␣⏎⇥]/.test(part) ? element("i", { className: "mark", textContent: part }) : part,
    );
const chip = (label) => element("code", { className: "chip" }, ...tokenText(label));
const cut = (label) => (label.length > 24 ? `${label.slice(0, 23)}…` : label);

const goButton = (title, onclick, ...children) =>
  element("button", { className: "go", type: "button", title, onclick }, ...children);
const clearButton = (onclick) =>
  element("button", { className: "close", type: "button", textContent: "Clear", onclick });
const facts = (pairs) =>
  element(
    "dl",
    { className: "facts" },
    ...pairs.map(([name, value]) =>
      element(
        "div",
        {},
        element("dt", { textContent: name }),
        element("dd", { textContent: value }),
      ),
    ),
  );

// Pulls are [source, weight] everywhere, strongest first; the weights of all sources sum to 1, or
// with a background to less. What is missing is `quiet`, null without a background.
const distanceBack = (position, source) =>
  source === position ? "itself" : `${plain.format(position - source)} back`;

const pullList = (position, pulls, labelOf, goTo) =>
  element(
    "ol",
    { className: "pulls" },
    ...pulls.map(([source, weight]) =>
      element(
        "li",
        { style: { "--share": `${(100 * weight) / pulls[0][1]}%` } },
        goTo(
          source,
          chip(labelOf(source)),
          bold(percent(weight)),
          context(distanceBack(position, source)),
        ),
      ),
    ),
  );

const otherPulls = (pulls, whole, quiet) => {
  if (pulls.length === 1 && pulls[0][0] === 0) return "There are no others.";
  const shown = pulls.reduce((sum, [, weight]) => sum + weight, 0);
  const rest = (quiet === null ? whole : 1 - quiet) - shown;
  if (quiet === null && rest <= 0.0005) return "There are no others.";
  return `All others together: ${percent(Math.max(0, rest))}.`;
};

// The pulls on a token and the background's share, or whose it is; without they sum to `whole`.
const BACKGROUND = "the background's share, which passes on nothing";
const pulledBy = (position, pulls, quiet, whole, labelOf, goTo, silence = BACKGROUND) => [
  ...(pulls.length
    ? [pullList(position, pulls, labelOf, goTo), note(otherPulls(pulls, whole, quiet))]
    : quiet === null
      ? [note("Nothing reaches it.")]
      : []),
  ...(quiet === null
    ? []
    : [note(`Quiet ${percent(quiet)}: ${silence}.`)]),
];

// A token as a screen reader says it.
const spokenToken = (position, mass, pulls, quiet, labelOf) =>
  [
    `${labelOf(position)}, position ${position}`,
    ...(mass === null ? [] : [`mass ${number(mass)}`]),
    ...pulls
      .slice(0, 3)
      .map(([source, weight]) => `pulled ${percent(weight)} by ${labelOf(source)}`),
    ...(quiet === null ? [] : [`quiet ${percent(quiet)}`]),
  ].join(", ");

// scrollIntoView would move the page too; offsetTop counts from the list, which is positioned.
const scrollWithin = (list, made) => {
  const { scrollTop, clientHeight } = list;
  if (made.offsetTop < scrollTop || made.offsetTop > scrollTop + clientHeight - 30)
    list.scrollTop = made.offsetTop - clientHeight / 2;
};

// The clipboard may be closed to a page, then an older way serves.
const copyText = async (text) => {
  try {
    await navigator.clipboard.writeText(text);
  } catch {
    const field = element("textarea", { value: text, className: "spoken" });
    document.body.append(field);
    field.select();
    const isCopied = document.execCommand("copy");
    field.remove();
    if (!isCopied) throw new Error("not copied");
  }
};
