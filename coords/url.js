// What is shown, as readable text in the page's address, so that a link opens the same picture.

// What an address may hold: how a value is written, and what a text means (undefined: nothing).
const wholeIn = (text, low, high) => {
  const found = /^\d{1,9}$/.test(text) ? Number(text) : NaN;
  return found >= low && found <= high ? found : undefined;
};
const oneOf = (text, names) => (names.includes(text) ? text : undefined);
const optionsOf = (id) => [...$(id).options].map((option) => option.value);
const mostHeads = () => Math.max(...RUNS.map((run) => run.numHeads));

const ADDRESS = {
  view: {
    write: (state) => state.view,
    read: (text) => oneOf(text, Object.keys(VIEWS)),
  },
  token: {
    write: (state) => state.token.get(RUNS[0]),
    read: (text) => wholeIn(text, 0, (RUNS[0]?.count ?? 0) - 1),
  },
  layer: {
    write: (state) => state.layer,
    read: (text) => wholeIn(text, 0, DEEPEST),
  },
  head: {
    write: (state) => (state.head === "mean" ? "mean" : state.head + 1),
    read: (text) => {
      const head = wholeIn(text, 1, mostHeads());
      return text === "mean" ? text : head && head - 1;
    },
  },
  colour: {
    write: (state) => state.colour,
    read: (text) => oneOf(text, optionsOf("colour")),
  },
  split: {
    write: (state) => state.split,
    read: (text) => oneOf(text, ["colour", "axes"]),
  },
  fit: {
    name: "isFit",
    write: (state) => (state.isFit ? "layer" : "all"),
    read: (text) => ({ layer: true, all: false })[text],
  },
  trails: {
    write: (state) => (state.trails ? "on" : "off"),
    read: (text) => ({ on: true, off: false })[text],
  },
};

// What a view keeps of its own: the map its camera, another what it shows of the heads.
const ownKey = (state) => (state.view === "map" ? "camera" : "shown");

const addressOf = (state, own) => {
  const found = new URLSearchParams();
  for (const [key, { write }] of Object.entries(ADDRESS)) found.set(key, write(state));
  if (own) found.set(ownKey(state), own);
  return `#${String(found).replaceAll("%2C", ",")}`;
};

// The changes that an address asks for. Whatever it says wrong is left out, the rest holds.
const readAddress = (hash) => {
  const given = new URLSearchParams(hash.replace(/^#/, ""));
  const changes = {};
  for (const [key, { name = key, read }] of Object.entries(ADDRESS)) {
    const value = given.has(key) ? read(given.get(key)) : undefined;
    if (value !== undefined) changes[name] = value;
  }
  const own = given.get(ownKey({ ...state, ...changes }));
  return { changes, own };
};
