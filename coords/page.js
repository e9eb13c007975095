// The state of the page, the controls that change it, and the tabs.

const SECONDS_PER_LAYER = 1.1;

// The views in the order of their keys 1 to 5: their class, and the controls that they use.
const VIEWS = {
  orbit: { title: "Orbit", make: Orbit, controls: ["layer", "head", "colour", "scale", "play"] },
  map: {
    title: "Map",
    make: Scene,
    controls: ["layer", "head", "colour", "fit", "trails", "play"],
  },
  heads: { title: "Heads", make: Heads, isWide: true, controls: ["layer", "head"] },
  next: { title: "Next token", make: Next, controls: ["layer", "head", "colour", "scale"] },
  masses: { title: "Masses", make: Masses, isWide: true, controls: [] },
};
const state = {
  view: "orbit",
  token: new Map(),
  layer: 1,
  at: 1,
  head: "mean",
  colour: "none",
  split: "colour",
  trails: true,
  isFit: true,
  playing: false,
};
// Per run: its stage, text and details, and the views that were opened so far.
let parts = [];
const shownViews = () => parts.map((part) => part.views[state.view]).filter(Boolean);

const actions = {
  // Merges changes of the state; a token is one of `run`, in the others the same place of the text.
  set(changes, run = RUNS[0]) {
    if (!RUNS.length) return;
    const { token, playing, layer, ...others } = changes;
    if (others.view && others.view !== state.view) pause();
    Object.assign(state, others);
    if (token !== undefined && token !== null) choose(run, token);
    const lowest = state.view === "map" ? 0 : 1;
    if (layer !== undefined) state.at = state.layer = layer;
    else if (others.at !== undefined) state.layer = Math.ceil(state.at);
    if (state.layer < lowest || state.layer > DEEPEST)
      state.at = state.layer = Math.max(lowest, Math.min(DEEPEST, state.layer));
    if (playing !== undefined && playing !== state.playing) play(playing);
    draw();
  },
  select(run, token) {
    if (token === null || token === undefined) return;
    openSheet(true);
    actions.set({ token }, run);
  },
  hover(run, token) {
    parts.find((part) => part.run === run)?.words.hover(token);
    parts.find((part) => part.run === run)?.views[state.view]?.hover?.(token);
  },
  showHead(layer, head, view = "orbit") {
    actions.set({ layer, head, view });
  },
  // Asks the server; offline only a switched-off head was computed before.
  async whatIf(run, changes, token) {
    if (live) return live.whatIf(run, changes, token);
    const [{ kind, layer, head }, ...more] = changes;
    const without = kind === "off" && !more.length ? run.without(layer, head, token) : null;
    if (!without)
      throw new Error(
        "This page can only switch off one head. For more, open the live page: chat.py --serve.",
      );
    const before = run.next(run.numLayers, token);
    const ids = new Map([...before, ...without].map(([label, , id]) => [id, label]));
    const chanceIn = (rows, id) => rows.find((row) => row[2] === id)?.[1] ?? null;
    return {
      rows: [...ids].map(([id, label]) => [label, chanceIn(before, id), chanceIn(without, id)]),
      loss:
        token + 1 < run.count
          ? [run.loss[token + 1], run.lossWithout(layer, head, token)]
          : null,
      source: "computed before",
    };
  },
  branch(run, token, id, label) {
    live?.branch(run, token, id, label);
  },
};
const live = GIVEN.live ? new Live(actions) : null;

// On a phone the details are a sheet at the bottom: closed, it shows the token and its facts.
function openSheet(isOpen) {
  document.body.classList.toggle("sheet-open", isOpen);
  $("sheet").firstElementChild.textContent = isOpen ? "Close" : "More";
}

function choose(run, token) {
  const place = Math.max(0, Math.min(run.count - 1, token));
  // a word may begin with its space, which is a token of its own for another model
  const space = /^[␣⏎⇥]*(?=.)/u.exec(run.texts[place])?.[0].length ?? 0;
  for (const other of RUNS)
    state.token.set(other, other === run ? place : other.tokenAt(run.starts[place] + space));
}

// Draws what is shown; each part changes only what changed.
function draw() {
  if (!parts.length) return;
  const { isWide, make } = VIEWS[state.view];
  $("panel").className = `${parts.length > 1 ? "two" : "one"}${isWide ? " wide" : ""}`;
  for (const part of parts) {
    const { run, stage, words, details, views } = part;
    views[state.view] ??= new make(run, actions);
    const { node } = views[state.view];
    if (node.parentElement !== stage) stage.append(node);
    for (const view of Object.values(views)) view.node.hidden = view.node !== node;
    views[state.view].update(state);
    if (isWide) continue;
    words.update(state);
    details.update(state);
  }
  drawControls();
  writeAddressSoon();
}

function drawControls() {
  const { controls } = VIEWS[state.view];
  $("controls").hidden = !controls.length;
  for (const label of $("controls").querySelectorAll("[data-of]"))
    label.hidden = !controls.includes(label.dataset.of);
  $("play").hidden = !controls.includes("play");
  for (const tab of $("tabs").children) {
    const isOpen = tab.id === `tab-${state.view}`;
    tab.setAttribute("aria-selected", String(isOpen));
    tab.tabIndex = isOpen ? 0 : -1;
  }
  $("panel").setAttribute("aria-labelledby", `tab-${state.view}`);
  const name = `Layer ${state.layer} of ${DEEPEST}`;
  $("layer").min = state.view === "map" ? 0 : 1;
  $("layer").value = state.layer;
  $("layer").setAttribute("aria-valuetext", name);
  $("layer-name").textContent = name;
  $("head").value = state.head;
  $("fit").value = state.isFit ? "fit" : "one";
  $("trails").checked = state.trails;
  $("colour").value = state.colour;
  $("play").textContent = state.playing ? "Pause" : "Play";
  $("play").title = state.view === "map" ? "from layer to layer" : "token by token";
  $("play").setAttribute("aria-pressed", String(state.playing));
  $("scale").hidden ||= state.colour === "none";
  if ($("scale").hidden) return;
  const { low, high, ramp } = colouring(RUNS[0], state.colour);
  const [first, bar, last] = $("scale").children;
  [first.textContent, last.textContent] = [low, high];
  bar.style.background = `linear-gradient(to right, ${ramp})`;
}

// The orbit plays the sentence itself; the map is moved from layer to layer here.
function play(isPlaying) {
  state.playing = isPlaying;
  if (!isPlaying) state.at = state.layer;
  const views = shownViews();
  if (views.some((view) => view.play)) views.forEach((view) => view.play?.(isPlaying));
  else if (isPlaying) playLayers();
}
const pause = () => state.playing && play(false);

function playLayers() {
  if (state.at >= DEEPEST) state.at = state.layer = 0;
  let [from, start] = [state.at, performance.now() + 350];
  const eased = (x) => (x < 0.5 ? 2 * x * x : 1 - 2 * (1 - x) ** 2);
  const step = (now) => {
    if (!state.playing) return;
    const share = Math.min(1, Math.max(0, (now - start) / 1000 / SECONDS_PER_LAYER));
    actions.set({ at: calm.matches ? Math.floor(from + share) : from + eased(share) });
    if (share === 1) [from, start] = [from + 1, now + 250];
    if (from >= DEEPEST) return actions.set({ playing: false });
    requestAnimationFrame(step);
  };
  requestAnimationFrame(step);
}

// The address follows a little later: a browser refuses hundreds of changes in a few seconds.
let writing = null;
const address = () => addressOf(state, parts[0]?.views[state.view]?.hash?.());
function writeAddress() {
  clearTimeout(writing);
  if (location.protocol === "about:") return; // shown inside a notebook, which has the address
  if (parts.length && !state.playing) history.replaceState(null, "", address());
}
function writeAddressSoon() {
  clearTimeout(writing);
  writing = setTimeout(writeAddress, 150);
}
function followAddress() {
  if (!parts.length || live?.isOfAnotherText()) return;
  const { changes, own } = readAddress(location.hash);
  actions.set(changes);
  if (own) shownViews().forEach((view) => view.restore?.(own));
}

function fillDownloads() {
  const views = shownViews();
  const entries = downloads(state, views).map(([textContent, save]) =>
    element("button", {
      type: "button",
      textContent,
      onclick: () => {
        $("download").open = false;
        save();
      },
    }),
  );
  $("download").lastElementChild.replaceChildren(...entries);
}

function makeTabs() {
  const tabs = Object.entries(VIEWS).map(([name, { title }], n) => {
    const tab = element("button", { id: `tab-${name}`, type: "button", textContent: title });
    tab.setAttribute("role", "tab");
    tab.setAttribute("aria-controls", "panel");
    tab.title = `press ${n + 1}`;
    tab.onclick = () => actions.set({ view: name });
    return tab;
  });
  $("tabs").append(...tabs);
  $("tabs").onkeydown = (event) => {
    const n = tabs.indexOf(event.target);
    const next = { ArrowLeft: n - 1, ArrowRight: n + 1, Home: 0, End: -1 }[event.key];
    if (next === undefined) return;
    event.preventDefault();
    event.stopPropagation();
    const tab = tabs.at(next % tabs.length);
    tab.click();
    tab.focus();
  };
}

function listen() {
  $("play").onclick = () => actions.set({ playing: !state.playing });
  $("layer").oninput = () => actions.set({ layer: Number($("layer").value), playing: false });
  $("head").onchange = () => {
    const head = $("head").value;
    actions.set({ head: head === "mean" ? head : Number(head) });
  };
  $("colour").onchange = () => actions.set({ colour: $("colour").value });
  $("fit").onchange = () => actions.set({ isFit: $("fit").value === "fit" });
  $("trails").onchange = () => actions.set({ trails: $("trails").checked });
  $("search").oninput = find;
  $("search").onkeydown = (event) => {
    if (event.key === "Enter") goToFound(event.shiftKey ? -1 : 1);
    if (event.key === "Escape") $("search").blur();
  };
  $("copy").onclick = async () => {
    writeAddress();
    const said = await copyText(location.href).then(
      () => "Copied",
      () => "Not copied",
    );
    $("copy").textContent = said;
    setTimeout(() => ($("copy").textContent = "Copy link"), 1500);
  };
  $("download").firstElementChild.onclick = fillDownloads;
  $("help").onclick = () => $("keys").showModal();
  $("more").onclick = () => {
    const isOpen = document.body.classList.toggle("controls-open");
    $("more").setAttribute("aria-expanded", String(isOpen));
  };
  document.addEventListener("keydown", onKey);
  document.addEventListener("pointerdown", (event) => {
    if (!$("download").contains(event.target)) $("download").open = false;
  });
  addEventListener("hashchange", followAddress);
  dark.addEventListener("change", draw);
  let waiting = null;
  new ResizeObserver(() => {
    cancelAnimationFrame(waiting);
    waiting = requestAnimationFrame(draw);
  }).observe($("panel"));
}

// Where a page opens: the head whose pull on a token is strongest, by a word that does not stand
// just before it.
function firstHead(run, token) {
  let found = { layer: run.numLayers, head: "mean", share: 0 };
  for (let layer = 1; layer <= run.numLayers; layer++)
    for (let head = 0; head < run.numHeads; head++)
      for (const [source, share] of run.pulls(layer, head, token, 3))
        if (token - source > 1 && share > found.share && /[\p{L}\p{N}]/u.test(run.texts[source]))
          found = { layer, head, share };
  return { layer: found.layer, head: found.head };
}

// Shows what was given: at the start the page's own data, on the live page each new text.
function openPage(given) {
  pause();
  readRuns(given);
  const [run] = RUNS;
  parts = RUNS.map((run) => ({
    run,
    views: {},
    stage: element(
      "section",
      { className: "stage" },
      ...(RUNS.length > 1 ? [element("h2", { textContent: run.name })] : []),
    ),
    words: new Words(run, actions),
    details: new Details(run, actions),
  }));
  const sheet = element("div", { id: "sheet" }, ...parts.map((part) => part.details.node));
  sheet.prepend(
    element("button", {
      ...{ className: "close", type: "button" },
      onclick: () => openSheet(!document.body.classList.contains("sheet-open")),
    }),
  );
  $("panel").replaceChildren(
    ...parts.map((part) => part.stage),
    ...parts.map((part) => part.words.node),
    ...(parts.length ? [sheet] : []),
  );
  if (!run) return;
  openSheet(false);
  const step = RUNS.length > 1 ? "" : `, step ${plain.format(run.step)}`;
  $("subtitle").textContent = $("subtitle").title =
    RUNS.map((run) => `${run.name}${step}, ${run.law}`).join(" · ") +
    ` · ${plural(run.count, "token")} of ${run.source}`;
  $("head-name").textContent = RUNS.some((run) => run.hasGravity) ? "Pull of" : "Attention of";
  $("layer").max = DEEPEST;
  $("layers").replaceChildren(
    ...Array.from({ length: DEEPEST + 1 }, (_, n) => element("option", { value: n })),
  );
  $("head").replaceChildren(
    element("option", { value: "mean", textContent: "all heads (mean)" }),
    ...Array.from({ length: mostHeads() }, (_, n) =>
      element("option", { value: n, textContent: `head ${n + 1}` }),
    ),
  );
  state.token = new Map();
  choose(run, firstToken(run));
  Object.assign(state, firstHead(run, state.token.get(run)));
  if (given.layer !== null) Object.assign(state, { layer: given.layer, head: "mean" });
  state.at = state.layer;
  if (!RUNS.some((run) => run.hasGravity)) state.view = "heads";
  followAddress();
  find();
}

makeTabs();
if (live) $("live").append(live.node);
listen();
try {
  openPage(GIVEN);
} catch (error) {
  $("panel").replaceChildren(note(`This browser cannot draw the page: ${error.message}`));
  console.error(error);
}
document.body.dataset.ready = "yes";
