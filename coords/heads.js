// The second tab: what each head looks at.

const COLUMNS = [
  {
    key: "name",
    title: "head",
    of: (row) => `block ${row.layer} · head ${row.head + 1}`,
    order: (row) => row.layer * 1000 + row.head,
  },
  {
    key: "most_distance",
    title: "looks mostly",
    of: (row) => back(row.most_distance, row.most_share),
    hint: "the distance that most of its pull comes from in this text, and how much; far and wide: none gives a tenth",
  },
  {
    key: "one_back",
    title: "from 1 back",
    of: (row) => (row.one_back === null ? "none" : percent(row.one_back)),
    hint: "share of its pull in this text that comes from one token back",
  },
  {
    key: "mean_distance",
    title: "mean distance",
    of: (row) => number(row.mean_distance),
    hint: "tokens back, mean over its pull in this text",
  },
  {
    key: "within",
    title: "90 % within",
    of: (row) => (row.within === null ? "none" : plain.format(row.within)),
    hint: "tokens back from within which 90 % of its pull comes in this text",
  },
  {
    key: "window",
    title: "window",
    of: (row) => number(row.window),
    hint: "tokens back beyond which it feels exactly nothing",
  },
  {
    key: "time_scale",
    title: "time scale",
    of: (row) => number(row.time_scale),
    hint: "softening lengths a token of time: the smaller, the farther it sees",
  },
  {
    key: "time_offset",
    title: "offset",
    of: (row) => number(row.time_offset),
    hint: "tokens back at which its field is strongest",
  },
  {
    key: "radius",
    title: "radius",
    of: (row) => number(row.radius),
    hint: "distance beyond which it feels nothing, under the law newton in softening lengths",
  },
  {
    key: "retardation",
    title: "retardation",
    of: (row) => number(row.retardation),
    hint: "how far a source is felt where its predecessor is (1: wholly), mean over the head's coordinates",
  },
  {
    key: "gamma",
    title: "gamma",
    of: (row) => number(row.gamma),
    hint: "scales the score -gamma / r²",
  },
  { key: "bias", title: "bias", of: (row) => number(row.bias), hint: "added to the score" },
];
const back = (distance, share) => {
  if (distance === null) return "nothing";
  if (share < 0.1) return "far and wide";
  return `${distance ? `${plain.format(distance)} back` : "itself"} (${percent(share)})`;
};
const log1p = (distance) => Math.log10(1 + distance);
const TICKS = [0, 1, 3, 10, 30, 100, 300, 1000, 3000, 10000, 30000, 100000];

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

// A heading that reads the answer off the table.
const answers = (run) => {
  const best = (value) => run.heads.reduce((a, b) => (value(b) > value(a) ? b : a));
  const called = (row) => `block ${row.layer} head ${row.head + 1}`;
  const one = best((row) => row.one_back ?? -1);
  const far = best((row) => row.within ?? -1);
  const reach = best((row) => row.window ?? -1);
  const found = [
    one.one_back >= 0.1
      ? `Looks one token back: ${called(one)}, ${percent(one.one_back)} of whose pull comes from there.`
      : `No head looks one token back: at most ${percent(Math.max(0, one.one_back))} of a pull comes from there (${called(one)}).`,
    `Looks farthest here: ${called(far)}, 90 % of whose pull comes from within ${plural(far.within ?? 0, "token")}, mean distance ${number(far.mean_distance)}.`,
  ];
  if (run.law !== "published") {
    found.push(
      run.heads.some((row) => row.window === null)
        ? "Without a cutoff every head feels all that came before."
        : `Could see farthest: ${called(reach)}, whose window ends ${plural(reach.window, "token")} back.`,
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
        element("option", { value: n + 1, textContent: `block ${n + 1}` }),
      ),
    );
    this.body = element("tbody");
    this.columns = COLUMNS.filter(
      ({ key, order }) =>
        order || run.heads.some((row) => row[key] !== null && row[key] !== undefined),
    );
    this.heads = this.columns.map((column) => {
      const th = element(
        "th",
        { scope: "col" },
        element("button", {
          type: "button",
          textContent: column.title,
          title: column.hint ?? "",
          onclick: () => this.#sort(column),
        }),
      );
      return th;
    });
    const isNewton = run.field !== null;
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
        ...(isNewton
          ? [
              element(
                "figure",
                {},
                element("figcaption", {
                  textContent:
                    "The field it could feel: a mass of 1, no farther away than time makes it",
                }),
                this.field,
              ),
            ]
          : []),
        element(
          "figure",
          {},
          element("figcaption", {
            textContent:
              "The pull it did feel: share from so many tokens back, mean over this text",
          }),
          this.pull,
        ),
      ),
      element(
        "div",
        { className: "scroller", tabIndex: 0 },
        element(
          "table",
          {},
          element("caption", {
            textContent: "Every head. Press a heading to sort, a head to see its pull on the map.",
          }),
          element("thead", {}, element("tr", {}, ...this.heads)),
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
      element("p", { className: "note", textContent: this.#note() }),
    );
    this.#fill();
  }

  #note() {
    if (this.run.field === null)
      return "This is the first release's law: a softmax over scores that knows no time. Its positions are learned coordinates, so there is no field by distance; the pull is measured.";
    const retarded = this.run.heads.some((row) => row.retardation !== null);
    return (
      "Blocks and heads are counted from 1." +
      (retarded
        ? " A head with retardation near 1 is drawn to a token where that token's predecessor is: it looks for what once followed a token like this one, and not for the token itself. Its field is the same; the distance in space is measured to another place."
        : "")
    );
  }

  #sort(column) {
    this.falling = this.order === column ? !this.falling : column.key !== "name";
    this.order = column;
    this.#fill();
  }

  #fill() {
    const value = this.order?.order ?? ((row) => row[this.order?.key] ?? -Infinity);
    const rows = this.order
      ? this.run.heads.toSorted((a, b) => (this.falling ? -1 : 1) * (value(a) - value(b)))
      : this.run.heads;
    this.heads.forEach((th, n) => {
      if (this.columns[n] === this.order)
        th.setAttribute("aria-sort", this.falling ? "descending" : "ascending");
      else th.removeAttribute("aria-sort");
    });
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
                  element("button", {
                    className: "go",
                    type: "button",
                    textContent: column.of(row),
                    onclick: () => this.actions.showHead(row.layer, row.head),
                  }),
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
