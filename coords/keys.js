// Finding a token in the text, and the keys of the page.

const search = { found: [], at: -1 };
function find() {
  const run = RUNS[0];
  const wanted = $("search").value.toLowerCase();
  // each token at the place where it begins in the whole text, so that a word of several is found
  const texts = run.texts.map((text) => unmarked(text).toLowerCase());
  const ends = [];
  texts.reduce((sum, text) => (ends.push(sum + text.length), sum + text.length), 0);
  const whole = texts.join("");
  const found = new Set();
  for (let at = wanted ? whole.indexOf(wanted) : -1; at >= 0; at = whole.indexOf(wanted, at + 1))
    found.add(ends.findIndex((end) => end > at));
  [search.found, search.at] = [[...found], -1];
  parts[0].words.mark(search.found);
  $("found").textContent = wanted ? (found.size ? `${found.size} found` : "none") : "";
}
function goToFound(step) {
  const { found } = search;
  if (!found.length) return;
  const here = state.token.get(RUNS[0]);
  // at the first Enter from the selected token on
  if (search.at < 0) {
    const next = found.findIndex((token) => token >= here);
    search.at = (next < 0 ? found.length : next) - (step > 0 ? 1 : 0);
  }
  search.at = (search.at + step + found.length) % found.length;
  actions.select(RUNS[0], found[search.at]);
  $("found").textContent = `${search.at + 1} of ${found.length}`;
}

function goToTwin(step) {
  const run = RUNS[0];
  const token = state.token.get(run);
  const places = [token, ...run.twins(token)].sort((a, b) => a - b);
  const next = (places.indexOf(token) + step + places.length) % places.length;
  actions.select(run, places[next]);
}

function onKey(event) {
  const { target, key } = event;
  if (event.ctrlKey || event.metaKey || event.altKey || !parts.length) return;
  if (key === "Escape") return closeAll();
  if (target.matches("input, select, textarea, dialog *")) return;
  const isPressed = key === " " || key === "Enter";
  if (isPressed && target.matches("button, summary, a")) return;
  const part = parts.find(({ stage }) => stage.contains(target)) ?? parts[0];
  const view = part.views[state.view];
  // in the details the arrows scroll
  const isFree = !$("sheet").contains(target);
  if (isFree && view.keys?.(event)) return event.preventDefault();
  const run = parts.find(({ words }) => words.node.contains(target))?.run ?? part.run;
  const goTo = (token) => actions.select(run, token);
  const token = state.token.get(run);
  const { isWide, controls } = VIEWS[state.view];
  const everywhere = {
    n: () => goToTwin(1),
    p: () => goToTwin(-1),
    "/": () => $("search").select(),
    "?": () => $("keys").showModal(),
    " ": () => controls.includes("play") && actions.set({ playing: !state.playing }),
  };
  Object.keys(VIEWS).forEach((name, n) => (everywhere[n + 1] = () => actions.set({ view: name })));
  const inPicture = {
    ArrowLeft: () => goTo(token - 1),
    ArrowRight: () => goTo(token + 1),
    ArrowUp: () => actions.set({ layer: state.layer + 1 }),
    ArrowDown: () => actions.set({ layer: state.layer - 1 }),
    Home: () => goTo(0),
    End: () => goTo(run.count - 1),
  };
  const act = everywhere[key] ?? (isFree && !isWide ? inPicture[key] : undefined);
  if (!act) return;
  event.preventDefault();
  act();
}

function closeAll() {
  $("download").open = false;
  openSheet(false);
  if ($("search").value) {
    $("search").value = "";
    find();
  }
}
