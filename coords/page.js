// The state of the page, the controls that change it, and the tabs.

const SECONDS_A_LAYER = 1.1;
const state = {
  at: GIVEN.layer,
  shown: GIVEN.layer,
  head: "mean",
  colour: "mass",
  trails: true,
  selected: null,
  isFit: RUNS.some((run) => run.isUneven),
};
const views = [];
let [playing, drawn] = [false, { map: true, heads: false, vocabulary: false }];

const refresh = () =>
  views.forEach(({ scene, side }) => {
    scene.update(state);
    side.update(state);
  });
const moved = () => {
  views.forEach(({ scene }) => scene.update(state));
  describe();
};

function describe() {
  const layer = state.shown;
  $("layer").value = layer;
  const name = `Layer ${layer} of ${DEEPEST}`;
  $("layer-name").textContent = name;
  $("layer").setAttribute("aria-valuetext", name);
  $("explained").textContent = layer
    ? `After layer ${layer}, whose pull moved the tokens here. Select a token: lines go to the tokens that pulled it in this layer, thicker for a larger share; blue rings mark the same token elsewhere.`
    : "Before the first layer: each token is where its embedding puts it, so equal tokens are at the same place.";
  if (RUNS[0].law === "published" && !layer)
    $("explained").textContent =
      "Before the first layer: each token is where the embedding of its position puts it.";
}

function setLayer(layer) {
  stop();
  state.at = state.shown = Math.max(0, Math.min(DEEPEST, layer));
  describe();
  refresh();
}

function stop() {
  playing = false;
  $("play").textContent = "Play";
  $("play").setAttribute("aria-pressed", "false");
}

function play() {
  if (playing) return setLayer(Math.round(state.at));
  if (state.at >= DEEPEST) state.at = state.shown = 0;
  playing = true;
  $("play").textContent = "Pause";
  $("play").setAttribute("aria-pressed", "true");
  let [from, start] = [state.at, performance.now() + 350];
  const step = (now) => {
    if (!playing) return;
    const passed = Math.max(0, (now - start) / 1000 / SECONDS_A_LAYER);
    const eased = (x) => (x < 0.5 ? 2 * x * x : 1 - 2 * (1 - x) ** 2);
    const share = Math.min(1, passed);
    state.at = calm.matches ? Math.floor(from + share) : from + eased(share);
    const shown = Math.ceil(state.at);
    const isNew = shown !== state.shown;
    state.shown = shown;
    moved();
    if (isNew) views.forEach(({ side }) => side.update(state));
    if (share < 1) return requestAnimationFrame(step);
    if (from + 1 >= DEEPEST) return setLayer(DEEPEST);
    [from, start] = [from + 1, now + 250];
    requestAnimationFrame(step);
  };
  requestAnimationFrame(step);
}

const actions = {
  // Select a token of one run, and in the others the token at the same place in the text; null clears.
  select(run, token) {
    state.selected =
      token === null
        ? null
        : new Map(
            RUNS.map((other) => [other, other === run ? token : other.tokenAt(run.starts[token])]),
          );
    refresh();
  },
  hover(run, token) {
    const { scene } = views.find((view) => view.run === run);
    if (token === null) scene.hideTooltip();
    else scene.showTooltip(token);
  },
  showHead(layer, head) {
    state.head = head;
    $("head").value = head;
    setLayer(layer);
    openTab("map");
    $("head").focus();
  },
};

function onKey(event, view) {
  const onMap = event.currentTarget === view.scene.node;
  const { run, scene } = view;
  const token = state.selected?.get(run);
  const goTo = (next) => actions.select(run, Math.max(0, Math.min(run.count - 1, next)));
  const turns = {
    ArrowLeft: [-0.15, 0, 1],
    ArrowRight: [0.15, 0, 1],
    ArrowUp: [0, 0.1, 1],
    ArrowDown: [0, -0.1, 1],
  };
  const keys = {
    ArrowLeft: () => goTo((token ?? run.count) - 1),
    ArrowRight: () => goTo((token ?? -1) + 1),
    ArrowUp: () => setLayer(Math.round(state.at) + 1),
    ArrowDown: () => setLayer(Math.round(state.at) - 1),
    Home: () => goTo(0),
    End: () => goTo(run.count - 1),
    Escape: () => actions.select(run, null),
    " ": play,
    ...(onMap ? { "+": () => scene.move(0, 0, 0.9), "-": () => scene.move(0, 0, 1.1) } : {}),
  };
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  const act =
    onMap && event.shiftKey && turns[event.key]
      ? () => scene.move(...turns[event.key])
      : keys[event.key];
  if (!act) return;
  event.preventDefault();
  act();
}

const tabs = [...document.querySelectorAll("[role=tab]")];
const others = {
  heads: RUNS.map((run) => new Heads(run, actions)),
  vocabulary: RUNS.map((run) => new Vocabulary(run)),
};

function openTab(name, focus = false) {
  stop();
  for (const tab of tabs) {
    const isOpen = tab.id === `tab-${name}`;
    tab.setAttribute("aria-selected", String(isOpen));
    tab.tabIndex = isOpen ? 0 : -1;
    $(tab.getAttribute("aria-controls")).hidden = !isOpen;
    if (isOpen && focus) tab.focus();
  }
  if (name === "map") return refresh();
  others[name].forEach((part) => part.draw());
  drawn[name] = true;
}

function listen() {
  tabs.forEach((tab, n) => {
    tab.onclick = () => openTab(tab.id.slice(4));
    tab.onkeydown = (event) => {
      const next = { ArrowLeft: n - 1, ArrowRight: n + 1, Home: 0, End: tabs.length - 1 }[
        event.key
      ];
      if (next === undefined) return;
      event.preventDefault();
      openTab(tabs.at(next % tabs.length).id.slice(4), true);
    };
  });
  $("play").onclick = play;
  $("layer").oninput = () => setLayer(Number($("layer").value));
  $("colour").onchange = () => {
    state.colour = $("colour").value;
    refresh();
  };
  $("head").onchange = () => {
    state.head = $("head").value === "mean" ? "mean" : Number($("head").value);
    refresh();
  };
  $("scale").onchange = () => {
    state.isFit = $("scale").value === "fit";
    refresh();
  };
  $("trails").onchange = () => {
    state.trails = $("trails").checked;
    refresh();
  };
  dark.addEventListener("change", () => {
    refresh();
    for (const name of ["heads", "vocabulary"])
      if (drawn[name]) others[name].forEach((part) => part.draw());
  });
}

function start() {
  const given = RUNS[0];
  $("subtitle").textContent =
    `${RUNS.map((run) => `${run.name}, step ${plain.format(run.step)}, law ${run.law}`).join(" · ")} · ${plural(given.count, "token")} of ${given.source}`;
  $("scale").value = state.isFit ? "fit" : "one";
  $("layer").max = DEEPEST;
  $("layers").append(
    ...Array.from({ length: DEEPEST + 1 }, (_, n) => element("option", { value: n })),
  );
  const most = Math.max(...RUNS.map((run) => run.numHeads));
  $("head").append(
    element("option", { value: "mean", textContent: "all heads (mean)" }),
    ...Array.from({ length: most }, (_, n) =>
      element("option", { value: n, textContent: `head ${n + 1}` }),
    ),
  );
  $("views").classList.toggle("two", RUNS.length > 1);
  for (const run of RUNS) {
    const root = $("view").content.cloneNode(true).firstElementChild;
    root.querySelector("h2").textContent = run.name;
    $("views").append(root);
    const view = { run, scene: new Scene(run, root, actions), side: new Side(run, root, actions) };
    view.scene.node.addEventListener("keydown", (event) => onKey(event, view));
    view.side.text.addEventListener("keydown", (event) => onKey(event, view));
    view.side.update(state);
    views.push(view);
  }
  $("panel-heads").append(...others.heads.map((part) => part.node));
  $("panel-vocabulary").append(...others.vocabulary.map((part) => part.node));
  describe();
  listen();
  // Plotly is the last script of the page, so that the text can be read while it loads.
  document.addEventListener("DOMContentLoaded", async () => {
    await Promise.all(views.map(({ scene }) => scene.draw(state)));
    document.body.dataset.ready = "yes";
  });
}

start();
