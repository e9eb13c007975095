"use strict";
// The conversation with a model, token by token, and what pulled each of them.

const $ = (id) => document.getElementById(id);
const tokens = new Map(); // by position, oldest first: what the server said, and its element
const state = {
  about: null,
  version: 0,
  settings: {},
  isBusy: false, // an answer is being written, for this tab or another
  canRetry: false,
  canGoOn: false,
  pinned: null, // the position that was chosen
  hovered: null,
  lit: [], // elements that show something of the token shown
};

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

// Asking the server.

class Refusal extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

async function ask(path, body) {
  const options =
    body === undefined
      ? {}
      : {
          method: "POST",
          headers: { "Content-Type": "application/json" },
          body: JSON.stringify(body),
        };
  let response;
  try {
    response = await fetch(path, options);
  } catch {
    throw new Refusal(0, "The server does not answer: does chat.py still run?");
  }
  if (!response.ok) throw new Refusal(response.status, (await response.text()).trim());
  return response;
}

const askForJson = async (path, body) => (await ask(path, body)).json();

function notify(text, isBad = false) {
  $("notice").textContent = text;
  $("notice").classList.toggle("bad", isBad);
}

// The conversation.

function tokenElement(token) {
  const made = element("span", { id: `token-${token.position}`, className: "token" });
  made.dataset.position = token.position;
  made.setAttribute("role", "option");
  made.setAttribute("aria-selected", "false");
  setText(made, token.text);
  return made;
}

// Line ends get a mark that can be pointed at; a part of a character gets a dot.
function setText(made, text) {
  made.classList.toggle("part", text === "");
  made.replaceChildren(
    ...text
      .split(/(\n)/)
      .filter(Boolean)
      .flatMap((part) =>
        part === "\n" ? [element("i", { className: "mark", textContent: "⏎" }), "\n"] : [part],
      ),
  );
}

function add(given) {
  const list = $("conversation");
  let last = list.lastElementChild;
  for (const token of given) {
    if (!last || last.dataset.turn !== `${token.turn} ${token.author}`) {
      if (last?.classList.contains("empty")) last.remove();
      last = element("div", { className: `turn ${token.author}` });
      last.dataset.turn = `${token.turn} ${token.author}`;
      last.dataset.author = token.author === "you" ? "you" : "the model";
      last.setAttribute("role", "group");
      last.setAttribute("aria-label", last.dataset.author);
      list.append(last);
    }
    token.element = tokenElement(token);
    tokens.set(token.position, token);
    last.append(token.element);
  }
  while (tokens.size > state.about.keptTokens) remove(tokens.keys().next().value);
}

function remove(position) {
  const { element: gone } = tokens.get(position);
  const turn = gone.parentElement;
  gone.remove();
  if (!turn.childElementCount) turn.remove();
  tokens.delete(position);
  if (state.pinned === position) state.pinned = null;
  if (state.hovered === position) state.hovered = null;
}

let newestPosition = null;

function goBackTo(position) {
  for (const known of [...tokens.keys()]) if (known >= position) remove(known);
  newestPosition = [...tokens.keys()].at(-1) ?? null;
}

function load(given) {
  const { tokens: list, version, settings, isBusy, canRetry, canGoOn, ...about } = given;
  Object.assign(state, { about, version, isBusy, canRetry, canGoOn, pinned: null, hovered: null });
  tokens.clear();
  state.lit = [];
  $("conversation").replaceChildren(
    element("p", {
      className: "empty",
      textContent:
        "Nothing was said yet. The model goes on writing where your text ends, as the text it learned from does. " +
        (hasPulls()
          ? "Point at a token, tap it or walk to it with the arrow keys to see which earlier ones pulled it."
          : ""),
    }),
  );
  add(list);
  newestPosition = list.at(-1)?.position ?? null;
  showSettings(settings);
  $("subtitle").textContent = about.introduction;
  scrollDown();
  update();
}

const hasPulls = () => state.about.law === "newton";

function scrollDown() {
  $("conversation").scrollTop = $("conversation").scrollHeight;
}
const isAtEnd = () => {
  const { scrollTop, scrollHeight, clientHeight } = $("conversation");
  return scrollTop + clientHeight > scrollHeight - 60;
};

// Talking.

const handlers = {
  begin: (event) => (state.version = event.version),
  back: (event) => goBackTo(event.position),
  tokens: (event) => {
    add(event.tokens);
    newestPosition = event.tokens.at(-1).position;
  },
  rest: (event) => {
    const token = tokens.get(newestPosition);
    token.text += event.text;
    setText(token.element, token.text);
  },
  reading: (event) => {
    if (event.read < event.of)
      notify(`reading, ${plain.format(event.read)} of ${plain.format(event.of)} tokens`);
    else if ($("notice").textContent.startsWith("reading")) notify("");
  },
  notice: (event) => notify([$("notice").textContent, event.text].filter(Boolean).join("; ")),
  written: (event) =>
    notify(
      [
        $("notice").textContent,
        `${plain.format(event.count)} tokens, ${plain.format(event.count / event.seconds)} tokens/s`,
      ]
        .filter(Boolean)
        .join("; "),
    ),
  failed: (event) => notify(event.text, true),
  end: (event) => Object.assign(state, event),
};

let frame = null;
function updateSoon() {
  frame ??= requestAnimationFrame(() => {
    frame = null;
    update();
  });
}

async function talk(action, text = "") {
  if (state.isBusy || !$("composer").reportValidity()) return false;
  const settings = changedSettings();
  state.isBusy = true;
  state.pinned = state.hovered = null;
  notify("");
  update();
  let [isTaken, hasEnded] = [false, false];
  try {
    const response = await ask("/talk", { action, text, settings, version: state.version });
    isTaken = true;
    Object.assign(state.settings, settings);
    const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
    let rest = "";
    for (;;) {
      const { done, value } = await reader.read();
      if (done) break;
      const lines = (rest + value).split("\n");
      rest = lines.pop();
      const follows = isAtEnd();
      for (const event of lines.map((line) => JSON.parse(line))) {
        handlers[event.type](event);
        hasEnded ||= event.type === "end";
      }
      if (follows) scrollDown();
      updateSoon();
    }
    if (!hasEnded) throw new Refusal(0, "The server left in the middle of its answer.");
    if (!tokens.size) load(await askForJson("/state"));
  } catch (error) {
    if (error.status === 409) await reload(error.message);
    else notify(error.status ? error.message : error.message || "The server left.", true);
  }
  if (isTaken || !state.isElsewhere) state.isBusy = false;
  update();
  const answer = $("conversation").lastElementChild;
  if (hasEnded) $("spoken").textContent = answer.textContent.replaceAll("⏎", "");
  return isTaken;
}

async function send() {
  const text = $("prompt").value;
  if (!text || state.isBusy) return;
  $("prompt").value = "";
  const isTaken = await talk("send", text + ($("line-end").checked ? "\n" : ""));
  if (!isTaken && !$("prompt").value) $("prompt").value = text;
}

async function stop() {
  if (!state.isBusy) return;
  try {
    await ask("/stop", {});
  } catch (error) {
    notify(error.message, true);
  }
}

async function reset() {
  try {
    load(await askForJson("/reset", {}));
    notify("");
    $("prompt").focus();
  } catch (error) {
    notify(error.message, true);
  }
}

// What another tab did is shown here; while it does, this one waits.
async function reload(why) {
  try {
    load(await askForJson("/state"));
  } catch (error) {
    return notify(error.message, true);
  }
  state.isElsewhere = state.isBusy;
  notify(state.isBusy ? "An answer is being written in another tab." : why);
  if (state.isBusy) setTimeout(() => reload("This is how it went on in another tab."), 1000);
}

async function lookAgain() {
  if (document.hidden || state.isBusy) return;
  try {
    const { version } = await askForJson("/version");
    if (version !== state.version) await reload("This is how it went on in another tab.");
  } catch {
    // the next thing that is sent will say so
  }
}

// Settings.

const settingInputs = () => [...document.querySelectorAll(".settings input[name]")];

function showSettings(settings) {
  state.settings = settings;
  for (const input of settingInputs()) input.value = settings[input.name] ?? "";
  describeSettings();
}

function describeSettings() {
  $("settings-now").textContent = settingInputs()
    .filter((input) => input.value !== "")
    .map((input) => `${input.name} ${input.value}`)
    .join(", ");
}

// Those alone: a seed may be longer than numbers are here.
function changedSettings() {
  const changed = settingInputs().filter(
    (input) => input.value !== String(state.settings[input.name] ?? ""),
  );
  return Object.fromEntries(
    changed.map((input) => [input.name, input.value === "" ? null : Number(input.value)]),
  );
}

// The pulls.

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

function showButtons() {
  $("send").disabled = state.isBusy;
  $("stop").disabled = !state.isBusy;
  $("retry").disabled = state.isBusy || !state.canRetry;
  $("more").disabled = state.isBusy || !state.canGoOn;
  $("reset").disabled = state.isBusy;
  document.body.dataset.busy = state.isBusy ? "yes" : "no";
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

const where = (token, source) =>
  source === token.position ? "itself" : `${plain.format(token.position - source)} back`;

function pulledBy(token, pulls) {
  if (pulls === undefined) return [note(token.rows ? "These are not kept any more." : "…")];
  if (!pulls.length)
    return [note(token.rows?.length === 0 ? "These are not kept any more." : "Nothing is kept of it, or nothing reaches it.")];
  const rest = 1 - pulls.reduce((sum, [, weight]) => sum + weight, 0);
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
            chip(tokens.get(source)?.label ?? "earlier"),
            element("b", { textContent: percent(weight) }),
            element("span", { className: "context", textContent: where(token, source) }),
          ),
        ),
      ),
    ),
    note(rest > 0.0005 ? `All others together ${percent(rest)}.` : "There are no others."),
  ];
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
              chip(tokens.get(strongest[0])?.label ?? "earlier"),
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
      .map(([source, weight]) => `pulled ${percent(weight)} by ${tokens.get(source)?.label ?? "earlier"}`),
  ].join(", ");
}

// The conversation alone scrolls: scrollIntoView would move the page too.
function showInList(made) {
  const list = $("conversation");
  const top = made.offsetTop - list.offsetTop * (made.offsetParent !== list);
  if (top < list.scrollTop || top > list.scrollTop + list.clientHeight - 30)
    list.scrollTop = top - list.clientHeight / 2;
}

// Listening.

function listen() {
  $("composer").addEventListener("submit", (event) => {
    event.preventDefault();
    send();
  });
  $("prompt").addEventListener("keydown", (event) => {
    if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
    event.preventDefault();
    send();
  });
  document.addEventListener("keydown", (event) => {
    if (event.key !== "Escape") return;
    if (state.isBusy) stop();
    else choose(null);
  });
  $("stop").onclick = stop;
  $("retry").onclick = () => talk("retry");
  $("more").onclick = () => talk("more");
  $("reset").onclick = reset;
  $("head").onchange = update;
  $("settings").addEventListener("input", describeSettings);
  const list = $("conversation");
  const positionOf = (event) => {
    const made = event.target.closest(".token");
    return made ? Number(made.dataset.position) : null;
  };
  list.addEventListener("click", (event) => {
    const position = positionOf(event);
    if (position !== null) choose(position === state.pinned ? null : position);
  });
  list.addEventListener("pointerover", (event) => {
    if (event.pointerType === "touch") return;
    const position = positionOf(event);
    if (position === state.hovered) return;
    state.hovered = position;
    updateSoon();
  });
  list.addEventListener("pointerleave", () => {
    state.hovered = null;
    updateSoon();
  });
  list.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const positions = [...tokens.keys()];
    const at = positions.indexOf(state.pinned ?? newestPosition);
    const moves = { ArrowLeft: at - 1, ArrowRight: at + 1, Home: 0, End: positions.length - 1 };
    const next = moves[event.key];
    if (next === undefined || !positions.length) return;
    event.preventDefault();
    const isFirst = state.pinned === null && event.key.startsWith("Arrow");
    choose(positions[isFirst ? at : Math.max(0, Math.min(positions.length - 1, next))]);
  });
  document.addEventListener("visibilitychange", lookAgain);
  window.addEventListener("focus", lookAgain);
}

function fillPicker() {
  const { numLayers, numHeads } = state.about;
  $("picker").hidden = !hasPulls();
  $("head").append(
    element("option", { value: allHeads(), textContent: "all heads (mean)" }),
    ...Array.from({ length: numLayers }, (_, block) =>
      element(
        "optgroup",
        { label: `block ${block + 1}` },
        ...Array.from({ length: numHeads + 1 }, (_, head) =>
          element("option", {
            value: block * (numHeads + 1) + head,
            textContent:
              `block ${block + 1}, ` + (head === numHeads ? "mean of heads" : `head ${head + 1}`),
          }),
        ),
      ),
    ),
  );
}

async function start() {
  listen();
  try {
    const given = await askForJson("/state");
    state.about = given;
    fillPicker();
    load(given);
    if (given.isBusy) await reload("");
    document.body.dataset.ready = "yes";
    $("prompt").focus();
  } catch (error) {
    notify(error.message, true);
  }
}

start();
