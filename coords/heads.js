// The second tab: what each head looks at.

const headName = (row) => `layer ${row.layer} · head ${row.head + 1}`;
const farBack = (distance, share) => {
  if (distance === null) return "nothing";
  if (share < 0.1) return "spread out";
  return `${distance ? `${plain.format(distance)} back` : "itself"} (${percent(share)})`;
};
const orNone = (write) => (x) => (x === null ? "none" : write(x));

// A column of the table: the key of a row, the title, what it means, and how its value is written.
const column = (key, title, hint, write = (x) => number(x)) => ({
  key,
  title,
  hint,
  of: (row) => write(row[key], row),
  order: (row) => row[key] ?? -Infinity,
});
const NAME = {
  key: "name",
  title: "head",
  of: headName,
  order: (row) => row.layer * 1000 + row.head,
};
const COLUMNS = [
  column(
    "most_distance",
    "looks mostly",
    "the distance that most of its pull comes from in this text, and the share; spread out: no distance gives a tenth",
    (distance, row) => farBack(distance, row.most_share),
  ),
  column(
    "one_back",
    "from 1 back",
    "share of its pull in this text that comes from one token back",
    orNone(percent),
  ),
  column("mean_distance", "mean distance", "tokens back, mean over its pull in this text"),
  column(
    "within",
    "90 % within",
    "90 % of its pull in this text comes from at most this many tokens back",
    orNone(plain.format),
  ),
  column(
    "quiet",
    "quiet",
    "the background's share, mean over this text: so much weaker is what it passes on",
    orNone(percent),
  ),
  column(
    "window",
    "window",
    "tokens back beyond which its pull is exactly 0; with a background, next to nothing beside it",
  ),
  column(
    "time_scale",
    "time scale",
    "softening lengths per token of time: the smaller, the farther back it sees",
  ),
  column("time_offset", "offset", "tokens back at which its field is strongest"),
  column(
    "radius",
    "radius",
    "distance beyond which its pull is 0; with the law newton in softening lengths",
  ),
  column(
    "retardation",
    "retardation",
    "how much a source is felt at the place of the token before it (1: only there), mean over the head's coordinates",
  ),
  column(
    "background",
    "background",
    "what is added to the sum of its fields; a sum much smaller than that passes on next to nothing",
  ),
  column("gamma", "gamma", "scales the score -gamma / r²"),
  column("bias", "bias", "added to the score"),
];
const log1p = (distance) => Math.log10(1 + distance);
const TICKS = [0, 1, 3, 10, 30, 100, 300, 1000, 3000, 10000, 30000, 100000];

const figure = (caption, chart) =>
  element("figure", {}, element("figcaption", { textContent: caption }), chart);
const table = (caption, headings, body) =>
  element(
    "table",
    {},
    element("caption", { textContent: caption }),
    element("thead", {}, element("tr", {}, ...headings)),
    body,
  );

const chartLayout = (x, y, more = {}) => ({
  font: { family: css("--font"), size: 12, color: css("--ink") },
  paper_bgcolor: "rgba(0,0,0,0)",
  plot_bgcolor: "rgba(0,0,0,0)",
  margin: { l: 58, r: 12, t: 8, b: 46 },
  hoverlabel: { bgcolor: css("--card"), bordercolor: css("--line"), font: { color: css("--ink") } },
  legend: { orientation: "h", y: 1.02, yanchor: "bottom" },
  xaxis: { title: { text: x }, gridcolor: css("--line"), zeroline: false, ...more.xaxis },
  yaxis: { title: { text: y }, gridcolor: css("--line"), zeroline: false, ...more.yaxis },
  hovermode: more.hovermode ?? "closest",
});
const QUIET = { displayModeBar: false, responsive: true };

// The table in sentences: which head looks one token back, and which looks farthest.
const answers = (run) => {
  const best = (value) => run.heads.reduce((a, b) => (value(b) > value(a) ? b : a));
  const called = (row) => `layer ${row.layer} head ${row.head + 1}`;
  const one = best((row) => row.one_back ?? -1);
  const far = best((row) => row.within ?? -1);
  const reach = best((row) => row.window ?? -1);
  const found = [
    one.one_back >= 0.1
      ? `Looks one token back: ${called(one)}; ${percent(one.one_back)} of its pull comes from there.`
      : `No head looks one token back: at most ${percent(Math.max(0, one.one_back))} of the pull comes from there (${called(one)}).`,
    `Looks farthest in this text: ${called(far)}; 90 % of its pull comes from within ${plural(far.within ?? 0, "token")}, mean distance ${number(far.mean_distance)}.`,
  ];
  if (run.law !== "published") {
    found.push(
      run.heads.some((row) => row.window === null)
        ? "Without a cutoff every head feels all earlier tokens."
        : `Could see farthest: ${called(reach)}; its window ends ${plural(reach.window, "token")} back.`,
    );
  }
  return found;
};

class Heads {
  constructor(run, actions) {
    Object.assign(this, { run, actions, layer: 1, order: null, falling: false });
    this.field = element("div", { className: "chart" });
    this.pull = element("div", { className: "chart" });
    this.picker = element(
      "select",
      {
        onchange: () => {
          this.layer = Number(this.picker.value);
          this.draw();
        },
      },
      ...Array.from({ length: run.numLayers }, (_, n) =>
        element("option", { value: n + 1, textContent: `layer ${n + 1}` }),
      ),
    );
    this.body = element("tbody");
    // a column that no head of this run has a value for is left out
    this.columns = [
      NAME,
      ...COLUMNS.filter(({ key }) => run.heads.some((row) => (row[key] ?? null) !== null)),
    ];
    this.heads = this.columns.map((column) =>
      element(
        "th",
        { scope: "col" },
        element("button", {
          type: "button",
          textContent: column.title,
          title: column.hint ?? "",
          onclick: () => this.#sort(column),
        }),
      ),
    );
    this.node = element(
      "section",
      { className: "heads" },
      element("h2", { textContent: `${run.name}: what its heads look at` }),
      element(
        "ul",
        { className: "answers" },
        ...answers(run).map((line) => element("li", { textContent: line })),
      ),
      element("label", { className: "picker" }, "Curves of ", this.picker),
      element(
        "div",
        { className: "charts" },
        ...(run.field === null
          ? []
          : [
              figure(
                "Possible field by distance in time (mass 1, same place in space)",
                this.field,
              ),
            ]),
        figure(
          "Measured pull by distance in time (share of all its pull, mean over this text)",
          this.pull,
        ),
      ),
      element(
        "div",
        { className: "scroller", tabIndex: 0 },
        table(
          "Every head. Press a heading to sort, a head to see its pull on the map.",
          this.heads,
          this.body,
        ),
      ),
      element(
        "dl",
        { className: "glossary" },
        ...this.columns
          .filter(({ hint }) => hint)
          .flatMap(({ title, hint }) => [
            element("dt", { textContent: title }),
            element("dd", { textContent: hint }),
          ]),
      ),
      note(this.#note()),
    );
    this.#fill();
  }

  #note() {
    if (this.run.field === null)
      return "The law of the first release is a softmax over scores that do not depend on time. Its positions are learned coordinates, so there is no field by distance; the pull is measured.";
    const retarded = this.run.heads.some((row) => row.retardation !== null);
    return (
      "Layers and heads are counted from 1." +
      (retarded
        ? " A head with retardation near 1 feels each token at the place of the token before it, so it finds what followed a token like this one. Its field stays the same; the distance in space is measured to another place."
        : "")
    );
  }

  #sort(column) {
    this.falling = this.order === column ? !this.falling : column !== NAME;
    this.order = column;
    this.#fill();
  }

  #fill() {
    const value = this.order?.order;
    const rows = value
      ? this.run.heads.toSorted((a, b) => (this.falling ? -1 : 1) * (value(a) - value(b)))
      : this.run.heads;
    this.heads.forEach((th, n) => {
      if (this.columns[n] === this.order)
        th.setAttribute("aria-sort", this.falling ? "descending" : "ascending");
      else th.removeAttribute("aria-sort");
    });
    const showOnMap = (row) => () => this.actions.showHead(row.layer, row.head);
    this.body.replaceChildren(
      ...rows.map((row) =>
        element(
          "tr",
          {},
          ...this.columns.map((column, n) =>
            n
              ? element("td", { textContent: column.of(row) })
              : element(
                  "th",
                  { scope: "row" },
                  goButton("show its pull on the map", showOnMap(row), column.of(row)),
                ),
          ),
        ),
      ),
    );
  }

  draw() {
    const { run, layer } = this;
    this.picker.value = layer;
    const curves = (measured, unit) =>
      measured.of[layer - 1].map((values, head) => ({
        type: "scatter",
        mode: "lines",
        name: `head ${head + 1}`,
        line: headLine(head),
        x: measured.back.map(log1p),
        y: values,
        customdata: measured.back,
        hovertemplate: `head ${head + 1}: %{y:.3g} ${unit} %{customdata} back<extra></extra>`,
      }));
    const axis = { tickvals: TICKS.map(log1p), ticktext: TICKS.map((tick) => plain.format(tick)) };
    const layout = (y, longest, yaxis) =>
      chartLayout("tokens back (log)", y, {
        xaxis: { ...axis, range: [-0.02, log1p(longest)] },
        yaxis,
      });
    if (run.field)
      Plotly.react(
        this.field,
        curves(run.field, "at"),
        layout("field", run.field.back.at(-1), {
          range: [-0.02, 1.04 * Math.max(...run.field.of[layer - 1].flat())],
        }),
        QUIET,
      );
    Plotly.react(
      this.pull,
      curves(run.pull, "of the pull from"),
      layout("share of the pull (log)", run.pull.back.at(-1), {
        type: "log",
        range: [-4.2, 0.05],
        tickvals: [0.0001, 0.001, 0.01, 0.1, 1],
        ticktext: ["0.01 %", "0.1 %", "1 %", "10 %", "100 %"],
      }),
      QUIET,
    );
  }
}
