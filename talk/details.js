"use strict";
// Beside the conversation: what is known of a token, and in the text what pulled it.

const plain = new Intl.NumberFormat("en", { maximumFractionDigits: 0 });
const percent = (x) => (x >= 0.0995 ? `${Math.round(100 * x)} %` : `${(100 * x).toFixed(1)} %`);

// Text goes into the page as text, whatever it says.
const element = (name, properties = {}, ...children) => {
  const made = document.createElement(name);
  const { dataset, style, ...others } = properties;
  Object.assign(made, others);
  Object.assign(made.dataset, dataset);
  for (const [key, value] of Object.entries(style ?? {})) made.style.setProperty(key, value);
  made.append(...children);
  return made;
};
const note = (textContent) => element("p", { className: "note", textContent });

// A label with its marks for spaces and line ends paler than its letters.
const chip = (label) =>
  element(
    "code",
    { className: "chip" },
    ...(label.length > 24 ? `${label.slice(0, 23)}…` : label)
      .split(/([␣⏎⇥])/)
      .filter(Boolean)
      .map((part) =>
        /[␣⏎⇥]/.test(part) ? element("i", { className: "mark", textContent: part }) : part,
      ),
  );

const shownPosition = () => state.hovered ?? state.pinned ?? livePosition();
const allHeads = () => state.about.numLayers * (state.about.numHeads + 1);
const row = () => Number($("head").value);

// What the page was told of a token: the mean over all heads comes with it, the rest when asked.
const pullsOf = (token) => (row() === allHeads() ? token.pulls : token.rows?.[row()]);

// The newest token; of one head, the newest that the server was asked about in time.
const livePosition = () =>
  state.isBusy && row() !== allHeads() && tokens.has(answeredPosition)
    ? answeredPosition
    : newestPosition;

let [isAsking, answeredPosition] = [false, null];
async function askForRows(token) {
  if (isAsking || token.rows) return;
  isAsking = true;
  try {
    const { rows } = await askForJson(`/pulls?position=${token.position}`);
    token.rows = rows;
    answeredPosition = token.position;
  } catch {
    token.rows = []; // it is not kept any more
  }
  isAsking = false;
  updateSoon();
}

function update() {
  for (const made of state.lit) {
    made.style.removeProperty("--pull");
    made.classList.remove("source", "shown");
    made.setAttribute("aria-selected", "false");
  }
  state.lit = [];
  const position = shownPosition();
  const token = position === null ? undefined : tokens.get(position);
  const pulls = token && hasPulls() ? pullsOf(token) : [];
  for (const [source, weight] of pulls ?? []) {
    const made = tokens.get(source)?.element;
    if (!made) continue;
    made.style.setProperty("--pull", `${Math.round(12 + 72 * Math.sqrt(weight))}%`);
    made.classList.add("source");
    state.lit.push(made);
  }
  if (token) {
    token.element.classList.add("shown");
    token.element.setAttribute("aria-selected", String(position === state.pinned));
    state.lit.push(token.element);
  }
  const list = $("conversation");
  if (state.pinned === null) list.removeAttribute("aria-activedescendant");
  else list.setAttribute("aria-activedescendant", `token-${state.pinned}`);
  $("details").replaceChildren(...(token ? details(token, pulls) : overview()));
  // while tokens come only what is looked at is asked for
  const isWanted = row() !== allHeads() || !state.isBusy;
  const isLive = state.hovered === null && state.pinned === null;
  if (token && hasPulls() && isWanted) askForRows(isLive ? tokens.get(newestPosition) : token);
  showButtons();
}

const LAWLESS = {
  vanilla:
    "This is a vanilla transformer: it attends, and nothing in it has mass or pulls. An NGT checkpoint under the law newton shows here what pulled each token.",
  published:
    "There are no pulls live under the law published. visualize_coords.py draws them for a text; a checkpoint under the law newton shows them here.",
};
const lawless = () => note(LAWLESS[state.about.law === null ? "vanilla" : "published"]);

function overview() {
  return hasPulls()
    ? [note("What pulls the newest token shows here, and in the text: the stronger, the deeper.")]
    : [lawless()];
}

function fact(name, value) {
  return element(
    "div",
    {},
    element("dt", { textContent: name }),
    element("dd", { textContent: value }),
  );
}

function details(token, pulls) {
  const close = element("button", {
    className: "close",
    type: "button",
    textContent: "Let go",
    onclick: () => choose(null),
  });
  const facts = [
    fact("position", plain.format(token.position)),
    ...(token.mass === null ? [] : [fact("mass", token.mass.toPrecision(3))]),
    fact("written by", token.author === "you" ? "you" : "the model"),
  ];
  const head = [
    element(
      "div",
      { className: "title" },
      chip(token.label),
      ...(state.pinned === null ? [] : [close]),
    ),
    element("dl", { className: "facts" }, ...facts),
  ];
  if (!hasPulls()) return [...head, lawless()];
  return [
    ...head,
    element("h3", { textContent: `Pulled by (${rowName()})` }),
    ...pulledBy(token, pulls),
    ...headByHead(token),
  ];
}

function rowName() {
  const { numLayers, numHeads } = state.about;
  if (row() === allHeads()) return `mean of ${numLayers * numHeads} heads`;
  const [block, head] = [Math.floor(row() / (numHeads + 1)), row() % (numHeads + 1)];
  return `block ${block + 1}, ${head === numHeads ? `mean of ${numHeads} heads` : `head ${head + 1}`}`;
}

const labelOf = (position) =>
  tokens.get(position)?.label ?? dropped.get(position) ?? "earlier";
const where = (token, source) =>
  source === token.position ? "itself" : `${plain.format(token.position - source)} back`;

function pulledBy(token, pulls) {
  if (pulls === undefined) return [note(token.rows ? "What pulled it is not kept." : "…")];
  if (!pulls.length)
    return [note(token.rows?.length === 0 ? "What pulled it is not kept." : "Nothing reaches it.")];
  const [silent, heads] = silentHeads(token);
  const rest = 1 - silent / heads - pulls.reduce((sum, [, weight]) => sum + weight, 0);
  return [
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
            element("b", { textContent: percent(weight) }),
            element("span", { className: "context", textContent: where(token, source) }),
          ),
        ),
      ),
    ),
    note(
      [
        rest > 0.0005 ? `All others together ${percent(rest)}.` : "There are no others.",
        ...(silent ? [`Nothing reaches ${silent} of these ${heads} heads.`] : []),
      ].join(" "),
    ),
  ];
}

// Of the heads that the shown row is the mean of, how many feel nothing at all; and how many it is.
function silentHeads(token) {
  const { numLayers, numHeads } = state.about;
  const block = row() === allHeads() ? null : Math.floor(row() / (numHeads + 1));
  const isOfRow = (n) =>
    n % (numHeads + 1) !== numHeads &&
    (block === null || Math.floor(n / (numHeads + 1)) === block);
  if (block !== null && row() % (numHeads + 1) !== numHeads) return [0, 1];
  const rows = (token.rows ?? []).slice(0, -1).filter((_, n) => isOfRow(n));
  const silent = rows.filter((pulls) => !pulls.length).length;
  return [silent, block === null ? numLayers * numHeads : numHeads];
}

function headByHead(token) {
  if (!token.rows?.length) return [];
  const { numLayers, numHeads } = state.about;
  const items = [];
  for (let block = 0; block < numLayers; block++)
    for (let head = 0; head < numHeads; head++) {
      const index = block * (numHeads + 1) + head;
      const [strongest] = token.rows[index] ?? [];
      const button = element(
        "button",
        {
          className: "go",
          type: "button",
          title: `show what pulls under block ${block + 1}, head ${head + 1}`,
          onclick: () => {
            $("head").value = row() === index ? allHeads() : index;
            update();
          },
        },
        element("span", { textContent: `${block + 1}.${head + 1}` }),
        ...(strongest
          ? [
              chip(labelOf(strongest[0])),
              element("b", { textContent: percent(strongest[1]) }),
              element("span", { className: "context", textContent: where(token, strongest[0]) }),
            ]
          : [element("span", { className: "context", textContent: "nothing within reach" })]),
      );
      button.setAttribute("aria-pressed", String(row() === index));
      items.push(element("li", {}, button));
    }
  return [
    element("h3", { textContent: "Hardest pull of each head (block.head)" }),
    element("ol", { className: "by-head" }, ...items),
  ];
}

function goTo(position, ...children) {
  const isKept = tokens.has(position);
  return element(
    "button",
    {
      className: "go",
      type: "button",
      disabled: !isKept,
      title: isKept ? `choose position ${position}` : "so far back that it is not shown any more",
      onclick: () => {
        choose(position);
        $("conversation").focus({ preventScroll: true });
      },
    },
    ...children,
  );
}

function choose(position) {
  state.pinned = position;
  state.hovered = null;
  update();
  const token = tokens.get(position);
  if (!token) return ($("spoken").textContent = "");
  showInList(token.element);
  $("spoken").textContent = [
    `${token.label}, position ${token.position}`,
    ...(token.mass === null ? [] : [`mass ${token.mass.toPrecision(3)}`]),
    ...token.pulls
      .slice(0, 3)
      .map(([source, weight]) => `pulled ${percent(weight)} by ${labelOf(source)}`),
  ].join(", ");
}

// The conversation alone scrolls: scrollIntoView would move the page too.
function showInList(made) {
  const list = $("conversation");
  const top = made.offsetTop - list.offsetTop * (made.offsetParent !== list);
  if (top < list.scrollTop || top > list.scrollTop + list.clientHeight - 30)
    list.scrollTop = top - list.clientHeight / 2;
}
