// The third tab: the mass of every token, and how often it occurs.

const NAMED = 90;

class Vocabulary {
  constructor(run) {
    this.run = run;
    const { labels, masses, counts, size, median } = run.vocabulary;
    const listed = Math.min(20, Math.floor(labels.length / 2));
    const order = [...labels.keys()];
    const ranked = (caption, rows) =>
      table(
        caption,
        ["token", "mass", "times"].map((textContent) =>
          element("th", { scope: "col", textContent }),
        ),
        element(
          "tbody",
          {},
          ...rows.map((n) =>
            element(
              "tr",
              {},
              element("th", { scope: "row" }, chip(labels[n])),
              element("td", { textContent: number(masses[n], 4) }),
              element("td", { textContent: plain.format(counts[n]) }),
            ),
          ),
        ),
      );
    this.chart = element("div", { className: "chart tall" });
    const sampled =
      labels.length < size
        ? ` ${plain.format(labels.length)} of them are drawn, evenly spaced in the order of mass.`
        : "";
    this.node = element(
      "section",
      { className: "vocabulary" },
      element("h2", { textContent: `${run.name}: the masses of its tokens` }),
      note(
        `${plain.format(size)} tokens, masses from ${number(masses.at(-1))} to ${number(masses[0])}, median ${number(median)}. Times counted in ${run.counted}.${sampled}`,
      ),
      element(
        "div",
        { className: "weights" },
        figure("Mass against frequency, one point per token", this.chart),
        ranked("Heaviest", order.slice(0, listed)),
        ranked("Lightest", order.slice(-listed).reverse()),
      ),
    );
  }

  // The points whose names fit without overlap, taken from the edges of the cloud inwards.
  #named() {
    const { labels, masses, counts } = this.run.vocabulary;
    const [width, height] = [this.chart.clientWidth - 70, this.chart.clientHeight - 54];
    const decades = Math.log10(Math.max(...counts, 1)) + 0.8;
    const spread = masses[0] - masses.at(-1) || 1;
    const often = [...labels.keys()].sort((a, b) => counts[b] - counts[a]);
    const edges = [...labels.keys()].flatMap((n) => [
      n,
      labels.length - 1 - n,
      often[n],
      often[labels.length - 1 - n],
    ]);
    const taken = [];
    const found = new Set();
    for (const n of new Set(edges)) {
      if (found.size >= NAMED) break;
      const x = (width * (Math.log10(counts[n] || 0.5) + 0.3)) / decades;
      const y = (height * (masses[n] - masses.at(-1))) / spread;
      const half = 4 * cut(labels[n]).length + 3;
      if (
        taken.some(
          (other) => Math.abs(other.x - x) < other.half + half && Math.abs(other.y - y) < 17,
        )
      )
        continue;
      taken.push({ x, y, half });
      found.add(n);
    }
    return found;
  }

  draw() {
    const { labels, masses, counts } = this.run.vocabulary;
    const named = this.#named();
    const never = 0.5; // a log axis has no 0: tokens that do not occur are drawn here
    const trace = {
      type: "scatter",
      mode: "markers+text",
      x: counts.map((count) => count || never),
      y: masses,
      text: labels.map((label, n) => (named.has(n) ? escaped(cut(label)) : "")),
      textposition: "top center",
      textfont: { size: 11, color: css("--soft") },
      customdata: counts.map((count, n) => [count, escaped(labels[n])]),
      marker: {
        size: 7,
        opacity: 0.85,
        color: masses,
        colorscale: [0, 0.25, 0.5, 0.75, 1].map((x) => [x, shade(x)]),
        line: { width: 0.5, color: css("--page") },
      },
      hovertemplate:
        "<b>%{customdata[1]}</b><br>mass %{y:.4g}<br>%{customdata[0]:,} times<extra></extra>",
    };
    const most = Math.max(1, Math.ceil(Math.log10(Math.max(...counts, 1))));
    const powers = Array.from({ length: most + 1 }, (_, n) => 10 ** n);
    Plotly.react(
      this.chart,
      [trace],
      chartLayout(
        `times in ${this.run.isCorpus ? "the training text" : "this text"} (log)`,
        "mass",
        {
          xaxis: {
            type: "log",
            tickvals: [never, ...powers],
            ticktext: ["never", ...powers.map((x) => plain.format(x))],
          },
        },
      ),
      QUIET,
    );
  }
}
