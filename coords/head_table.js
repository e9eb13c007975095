// The table of heads: what each learned and what it looks at, sorted by any column.
const headName = (row) => `layer ${row.layer} · head ${row.head + 1}`;
const calledHead = (row) => `layer ${row.layer} head ${row.head + 1}`;
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

class HeadTable {
  // `press` is called with the row of a head that is pressed.
  constructor(run, press) {
    Object.assign(this, { run, press, order: null, falling: false });
    this.body = element("tbody");
    // a column that no head of this run has a value for is left out
    this.columns = [
      NAME,
      ...COLUMNS.filter(({ key }) => run.heads.some((row) => (row[key] ?? null) !== null)),
    ];
    this.headings = this.columns.map((column) =>
      element(
        "th",
        { scope: "col", dataset: { key: column.key } },
        element("button", {
          type: "button",
          textContent: column.title,
          title: column.hint ?? "",
          onclick: () => this.#sort(column),
        }),
      ),
    );
    this.node = element(
      "div",
      {},
      element(
        "div",
        { className: "scroller", tabIndex: 0 },
        table(
          `Every head. Press a heading to sort, a head to see its pull${run.hasGravity ? " in orbit" : ""}.`,
          this.headings,
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
    if (!this.run.hasGravity)
      return "Dot-product attention has no distance: what is called pull here is its attention, the softmax weights.";
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
    this.headings.forEach((th, n) => {
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
              ? element("td", { textContent: column.of(row), dataset: { key: column.key } })
              : element(
                  "th",
                  { scope: "row", dataset: { key: column.key } },
                  goButton("show its pull", () => this.press(row), column.of(row)),
                ),
          ),
        ),
      ),
    );
  }
}
