"use strict";
// The conversation with a model, token by token, and what pulled each of them.

const tokens = new Map(); // by position, oldest first: the server's data, and its element
const dropped = new Map(); // labels by position of tokens that are too far back to be shown
const MOST_DROPPED = 20000;
const state = {
  about: null,
  version: 0,
  settings: {},
  isBusy: false, // an answer is being written, in this tab or another
  canRetry: false,
  canUndo: false,
  canGoOn: false,
  pinned: null, // the selected position
  hovered: null,
  lit: [], // elements marked as the shown token or its sources
};

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
    throw new Refusal(0, "The server does not answer: is chat.py still running?");
  }
  if (!response.ok) throw new Refusal(response.status, (await response.text()).trim());
  return response;
}

const askForJson = async (path, body) => (await ask(path, body)).json();

const told = { notices: [], progress: "" };

// The line under the conversation: notices first, and how far the answer is.
function tell(news) {
  Object.assign(told, news);
  $("notice").textContent = [...told.notices, told.progress].filter(Boolean).join("; ");
  $("notice").classList.remove("bad");
}

function notify(text, isBad = false) {
  tell({ notices: [text], progress: "" });
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

// Line ends get a mark to point at; a token that is only a part of a character is shown as a dot.
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
  dropped.set(position, tokens.get(position).label);
  if (dropped.size > MOST_DROPPED) dropped.delete(dropped.keys().next().value);
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
  const { tokens: list, version, settings, isBusy, canRetry, canUndo, canGoOn, ...about } = given;
  Object.assign(state, { about, version, isBusy, canRetry, canUndo, canGoOn });
  state.pinned = state.hovered = null;
  tokens.clear();
  dropped.clear();
  state.lit = [];
  $("conversation").replaceChildren(empty());
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
    const progress = `reading, ${plain.format(event.read)} of ${plain.format(event.of)} tokens`;
    tell({ progress: event.read < event.of ? progress : "" });
  },
  notice: (event) => tell({ notices: [...told.notices, event.text] }),
  written: (event) => {
    const speed = plain.format(event.count / event.seconds);
    tell({ progress: `${plain.format(event.count)} tokens, ${speed} tokens/s` });
  },
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
    if (!hasEnded) throw new Refusal(0, "The server stopped in the middle of its answer.");
    if (!tokens.size) load(await askForJson("/state"));
  } catch (error) {
    if (error.status === 409) await reload(error.message);
    else if (error instanceof Refusal) notify(error.message, true);
    else notify("The server stopped in the middle of its answer.", true);
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

// Let the server change the conversation as a whole, and show the result.
async function change(path) {
  try {
    load(await askForJson(path, {}));
    notify("");
    $("prompt").focus();
  } catch (error) {
    notify(error.message, true);
  }
}

function reset() {
  if (!tokens.size || confirm("Forget the conversation? It cannot be brought back."))
    change("/reset");
}

// Show what another tab did, and wait while it is answered.
async function reload(why) {
  try {
    load(await askForJson("/state"));
  } catch (error) {
    return notify(error.message, true);
  }
  state.isElsewhere = state.isBusy;
  notify(state.isBusy ? "An answer is being written in another tab." : why);
  if (state.isBusy) setTimeout(() => reload("The conversation was continued in another tab."), 1000);
}

async function lookAgain() {
  if (document.hidden || state.isBusy) return;
  try {
    const { version } = await askForJson("/version");
    if (version !== state.version) await reload("The conversation was continued in another tab.");
  } catch {
    // the next request reports it
  }
}

function showButtons() {
  $("send").disabled = state.isBusy;
  $("stop").disabled = !state.isBusy;
  $("retry").disabled = state.isBusy || !state.canRetry;
  $("undo").disabled = state.isBusy || !state.canUndo;
  $("more").disabled = state.isBusy || !state.canGoOn;
  $("reset").disabled = state.isBusy;
  $("copy").disabled = $("save").disabled = !tokens.size;
  const [name, address] = tokens.size
    ? ["Map this", "/look#conversation"]
    : ["Look inside", "/look"];
  $("look").textContent = name;
  $("look").href = address;
  document.body.dataset.busy = state.isBusy ? "yes" : "no";
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
  $("undo").onclick = () => change("/undo");
  $("reset").onclick = reset;
  $("copy").onclick = copy;
  $("save").onclick = save;
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
