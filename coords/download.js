// What can be taken along: the data of the page, a table of its tokens, and the picture.

const save = (name, parts, type) => {
  const address = URL.createObjectURL(new Blob([parts], { type }));
  element("a", { href: address, download: name }).click();
  setTimeout(() => URL.revokeObjectURL(address), 10000);
};
const fileName = (run, ending) => `${run.name.replace(/[^\w.-]+/g, "_")}${ending}`;
const rounded = (x) => (x === null || x === undefined ? null : Number(x.toPrecision(6)));

// What the page shows of a run; shares are those of the selected token, per layer and head.
const dataOf = (state, run) => {
  const token = state.token.get(run);
  const every = (count, of) => Array.from({ length: count }, (_, n) => of(n));
  return {
    name: run.name,
    step: run.step,
    kind: run.kind,
    law: run.law,
    source: run.source,
    tokens: run.tokens,
    labels: run.labels,
    masses: run.mass,
    losses: run.loss,
    selected: {
      position: token,
      label: run.labels[token],
      expected: token
        ? run.next(run.numLayers, token - 1).map(([label, chance, id]) => ({ id, label, chance }))
        : [],
      heads: every(run.numLayers, (layer) =>
        every(run.numHeads, (head) => ({
          layer: layer + 1,
          head: head + 1,
          shares: [...run.shares(layer + 1, head, token)].map(rounded),
          background: rounded(run.quietOf(layer + 1, head, token)),
          distances: run.hasGravity
            ? [...run.orbit(layer + 1, head, token).distance].map(rounded)
            : null,
        })),
      ).flat(),
    },
  };
};

// One row per token; share and distance as the selected token feels it in the chosen head.
const tableOf = (state, run) => {
  const quoted = (text) => (/[",\n\r]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text);
  // a spreadsheet would take these for formulas
  const safe = (text) => (/^[=+\-@\t\r]/.test(text) ? `'${text}` : text);
  const [token, layer, head] = [
    state.token.get(run),
    run.layerOf(state.layer),
    shownHead(state, run),
  ];
  const shares = layer ? run.shares(layer, head, token) : [];
  const distances =
    layer && run.hasGravity && head !== "mean" ? run.orbit(layer, head, token).distance : [];
  const rows = run.labels.map((label, n) => [
    n,
    quoted(safe(label)),
    rounded(run.mass?.[n]),
    rounded(run.loss[n]),
    rounded(shares[n]),
    rounded(distances[n]),
  ]);
  const titles = ["position", "token", "mass", "loss", "share", "distance"];
  return [titles, ...rows].map((row) => row.join(",")).join("\n") + "\n";
};

// What style sheets say about an SVG: inherited, and otherwise as it is unless something is said.
const INHERITED = [
  ...["fill", "fill-opacity", "stroke", "stroke-width", "stroke-opacity", "stroke-dasharray"],
  ...["stroke-linecap", "stroke-linejoin", "visibility", "paint-order", "text-anchor"],
  ...["font-family", "font-size", "font-weight", "font-style", "dominant-baseline"],
];
const USUAL = { opacity: "1", display: "inline", filter: "none" };

// An SVG as a text that needs no style sheet: each element carries the style it has in the page.
const svgText = (svg) => {
  const copy = svg.cloneNode(true);
  const { width, height } = svg.getBoundingClientRect();
  const copies = [copy, ...copy.querySelectorAll("*")];
  [svg, ...svg.querySelectorAll("*")].forEach((original, n) => {
    const style = getComputedStyle(original);
    const above = n ? getComputedStyle(original.parentElement) : null;
    const take = (name, usual) => {
      const value = style.getPropertyValue(name);
      if (value !== usual || original.hasAttribute(name)) copies[n].style.setProperty(name, value);
    };
    for (const name of INHERITED) take(name, n ? above.getPropertyValue(name) : null);
    for (const [name, usual] of Object.entries(USUAL)) take(name, usual);
  });
  copy.setAttribute("xmlns", "http://www.w3.org/2000/svg");
  copy.setAttribute("width", width);
  copy.setAttribute("height", height);
  if (!copy.hasAttribute("viewBox")) copy.setAttribute("viewBox", `0 0 ${width} ${height}`);
  copy.style.setProperty("background", css("--card"));
  return new XMLSerializer().serializeToString(copy);
};

const PIXELS = 2; // per pixel of the page, for print
const canvasOf = async (svg) => {
  const { width, height } = svg.getBoundingClientRect();
  const image = new Image();
  image.src = `data:image/svg+xml;charset=utf-8,${encodeURIComponent(svgText(svg))}`;
  await image.decode();
  const canvas = element("canvas", { width: PIXELS * width, height: PIXELS * height });
  const pen = canvas.getContext("2d");
  pen.fillStyle = css("--card");
  pen.fillRect(0, 0, canvas.width, canvas.height);
  pen.drawImage(image, 0, 0, canvas.width, canvas.height);
  return canvas;
};
const savePng = async (view) => {
  const canvas = view.svg ? await canvasOf(view.svg()) : view.canvas();
  const blob = await new Promise((done) => canvas.toBlob(done));
  save(fileName(view.run, ".png"), blob, "image/png");
};
const saveSvg = (view) => save(fileName(view.run, ".svg"), svgText(view.svg()), "image/svg+xml");
const saveTable = (state, run) => save(fileName(run, ".csv"), tableOf(state, run), "text/csv");
const saveData = (state) => {
  const text = JSON.stringify(RUNS.map((run) => dataOf(state, run)));
  save(fileName(RUNS[0], ".json"), text, "application/json");
};

// The menu's entries for the shown views, [title, what it does].
const downloads = (state, views) => {
  // those with a picture: not the tables, and no orbit or map of a model without gravity
  const pictures = views.filter((view) => (view.svg || view.canvas) && view.run.hasGravity);
  const drawn = pictures.filter((view) => view.svg);
  return [
    ["Data (JSON)", () => saveData(state)],
    ["Tokens (CSV)", () => RUNS.forEach((run) => saveTable(state, run))],
    ...(drawn.length ? [["Picture (SVG)", () => drawn.forEach(saveSvg)]] : []),
    ...(pictures.length ? [["Picture (PNG)", () => Promise.all(pictures.map(savePng))]] : []),
  ];
};
