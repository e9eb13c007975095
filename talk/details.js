"use strict";
// Beside the conversation: the details of a token, and in the text what pulled it.

const shownPosition = () => state.hovered ?? state.pinned ?? livePosition();
const allHeads = () => state.about.numLayers * (state.about.numHeads + 1);
// A token has one row of pulls per head, one after each layer for the mean of its heads, and at the
// end one for the mean of all.
const row = () => Number($("head").value);
const rowOf = (layer, head) => layer * (state.about.numHeads + 1) + head;

// The mean over all heads comes with every token; the rows of the heads are asked for.
const pullsOf = (token) => (row() === allHeads() ? token.pulls : token.rows?.[row()]);
const quietOf = (token) =>
  row() === allHeads() ? token.quiet : (token.quietRows?.[row()] ?? null);

// The newest token, or if one head is shown during an answer, the newest one whose rows came.
const livePosition = () =>
  state.isBusy && row() !== allHeads() && tokens.has(answeredPosition)
    ? answeredPosition
    : newestPosition;

let [isAsking, answeredPosition] = [false, null];
async function askForRows(token) {
  if (isAsking || token.rows) return;
  isAsking = true;
  try {
    const { rows, quiet } = await askForJson(`/pulls?position=${token.position}`);
    Object.assign(token, { rows, quietRows: quiet });
    answeredPosition = token.position;
  } catch {
    token.rows = []; // the server keeps it no longer
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
  // while an answer comes, rows are asked for only if one head is shown
  const isWanted = row() !== allHeads() || !state.isBusy;
  const isLive = state.hovered === null && state.pinned === null;
  if (token && hasPulls() && isWanted) askForRows(isLive ? tokens.get(newestPosition) : token);
  showButtons();
}

const whyNoPulls = () =>
  note(
    state.about.law === null
      ? "This is a vanilla transformer: its tokens have no mass, and nothing pulls them. “Map this” shows what its heads attend to."
      : "The law published shows no pulls here. “Map this” shows them.",
  );

function overview() {
  return hasPulls()
    ? [note("What pulls the newest token is shown here, and coloured in the text.")]
    : [whyNoPulls()];
}

function details(token, pulls) {
  const head = [
    element(
      "div",
      { className: "title" },
      chip(cut(token.label)),
      ...(state.pinned === null ? [] : [clearButton(() => choose(null))]),
    ),
    facts([
      ["position", plain.format(token.position)],
      ...(token.mass === null ? [] : [["mass", number(token.mass)]]),
      ["written by", token.author === "you" ? "you" : "the model"],
    ]),
  ];
  if (!hasPulls()) return [...head, whyNoPulls()];
  return [
    ...head,
    heading(`Pulled by (${rowName()})`),
    ...listOfPulls(token, pulls),
    ...headByHead(token),
  ];
}

const headName = (head) =>
  head === state.about.numHeads ? `mean of ${head} heads` : `head ${head + 1}`;

function rowName() {
  const { numLayers, numHeads } = state.about;
  if (row() === allHeads()) return `mean of ${numLayers * numHeads} heads`;
  const [layer, head] = [Math.floor(row() / (numHeads + 1)), row() % (numHeads + 1)];
  return `layer ${layer + 1}, ${headName(head)}`;
}

function fillPicker() {
  const { numLayers, numHeads } = state.about;
  $("picker").hidden = !hasPulls();
  $("head").append(
    element("option", { value: allHeads(), textContent: "all heads (mean)" }),
    ...Array.from({ length: numLayers }, (_, layer) =>
      element(
        "optgroup",
        { label: `layer ${layer + 1}` },
        ...Array.from({ length: numHeads + 1 }, (_, head) =>
          element("option", {
            value: rowOf(layer, head),
            textContent:
              `layer ${layer + 1}, ` + (head === numHeads ? "mean of heads" : headName(head)),
          }),
        ),
      ),
    ),
  );
}

const labelOf = (position) =>
  cut(tokens.get(position)?.label ?? dropped.get(position) ?? "earlier");

function listOfPulls(token, pulls) {
  if (pulls === undefined && !token.rows) return [note("…")];
  if (!pulls?.length && token.rows?.length === 0) return [note("What pulled it is not kept.")];
  const [empty, heads] = countHeads(token);
  const whole = 1 - empty / heads;
  const made = pulledBy(token.position, pulls ?? [], quietOf(token), whole, labelOf, goTo);
  if (empty && pulls?.length)
    made.at(-1).append(` Nothing reaches ${empty} of these ${heads} heads.`);
  return made;
}

// [heads of the shown row that nothing reaches, heads that the row is the mean of]
function countHeads(token) {
  const { numLayers, numHeads } = state.about;
  const layer = row() === allHeads() ? null : Math.floor(row() / (numHeads + 1));
  if (layer !== null && row() !== rowOf(layer, numHeads)) return [0, 1];
  const isOfRow = (n) =>
    n % (numHeads + 1) !== numHeads && (layer === null || Math.floor(n / (numHeads + 1)) === layer);
  const rows = (token.rows ?? []).slice(0, -1).filter((_, n) => isOfRow(n));
  const empty = rows.filter((pulls) => !pulls.length).length;
  return [empty, layer === null ? numLayers * numHeads : numHeads];
}

function headByHead(token) {
  if (!token.rows?.length) return [];
  const { numLayers, numHeads } = state.about;
  const items = [];
  for (let layer = 0; layer < numLayers; layer++)
    for (let head = 0; head < numHeads; head++) {
      const index = rowOf(layer, head);
      const [strongest] = token.rows[index] ?? [];
      const button = goButton(
        `show the pulls of layer ${layer + 1}, head ${head + 1}`,
        () => {
          $("head").value = row() === index ? allHeads() : index;
          update();
        },
        element("span", { textContent: `${layer + 1}·${head + 1}` }),
        ...(strongest
          ? [
              chip(labelOf(strongest[0])),
              bold(percent(strongest[1])),
              context(distanceBack(token.position, strongest[0])),
            ]
          : [context("nothing within reach")]),
        ...(token.quietRows ? [context(`quiet ${percent(token.quietRows[index])}`)] : []),
      );
      button.setAttribute("aria-pressed", String(row() === index));
      items.push(element("li", {}, button));
    }
  return [
    heading("Hardest pull of each head (layer.head)"),
    element("ol", { className: "by-head" }, ...items),
  ];
}

function goTo(position, ...children) {
  const isKept = tokens.has(position);
  const button = goButton(
    isKept ? `select position ${position}` : "too far back to be shown",
    () => {
      choose(position);
      $("conversation").focus({ preventScroll: true });
    },
    ...children,
  );
  button.disabled = !isKept;
  return button;
}

function choose(position) {
  state.pinned = position;
  state.hovered = null;
  update();
  const token = tokens.get(position);
  if (!token) return ($("spoken").textContent = "");
  scrollWithin($("conversation"), token.element);
  $("spoken").textContent = spokenToken(position, token.mass, token.pulls, token.quiet, labelOf);
}
