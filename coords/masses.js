// The view of masses: the mass of every token of the vocabulary, and how often it occurs.

const NEVER = 0.5; // a log axis has no 0: tokens that do not occur are drawn here

class Masses {
  constructor(run) {
    this.run = run;
    if (!run.hasGravity) {
      const textContent =
        "In a vanilla transformer tokens have no masses. See Heads for what it looks at, and Next token for what it expects.";
      this.node = element("p", { className: "no-picture", textContent });
      return;
    }
    const { labels, masses, size, median } = run.vocabulary;
    const listed = Math.min(20, Math.floor(labels.length / 2));
    const order = [...labels.keys()];
    const sampled =
      labels.length < size
        ? ` ${plain.format(labels.length)} of them are drawn, evenly spaced in the order of mass.`
        : "";
    const { low, high } = massScale(run);
    this.place = element("figure");
    this.node = element(
      "section",
      { className: "masses" },
      note(
        `A token of mass 2 pulls twice as hard as one of mass 1 at the same distance. ${plain.format(size)} tokens, masses from ${number(masses.at(-1))} to ${number(masses[0])}, median ${number(median)}; colours from ${number(low)} to ${number(high)}, as in every view. Times counted in ${run.counted}.${sampled}`,
      ),
      element(
        "div",
        { className: "weights" },
        this.place,
        this.#ranked("Heaviest", order.slice(0, listed)),
        this.#ranked("Lightest", order.slice(-listed).reverse()),
      ),
    );
  }

  #ranked(caption, rows) {
    const { labels, masses, counts } = this.run.vocabulary;
    const heading = (textContent) => element("th", { scope: "col", textContent });
    const row = (n) => {
      const dot = element("i", { className: "dot", dataset: { mass: masses[n] } });
      const name = element("th", { scope: "row" }, dot, chip(labels[n]));
      const cell = (textContent) => element("td", { textContent });
      return element("tr", {}, name, cell(number(masses[n], 4)), cell(plain.format(counts[n])));
    };
    return element(
      "table",
      {},
      element("caption", { textContent: caption }),
      element("thead", {}, element("tr", {}, ...["token", "mass", "times"].map(heading))),
      element("tbody", {}, ...rows.map(row)),
    );
  }

  // Nothing here depends on the selection: drawn again only for another theme.
  update() {
    if (!this.run.hasGravity || this.isDark === dark.matches) return;
    this.isDark = dark.matches;
    const { share, size } = massScale(this.run);
    for (const dot of this.node.querySelectorAll(".dot")) {
      dot.style.setProperty("background", massShade(share(Number(dot.dataset.mass))));
      dot.style.setProperty("--size", `${7 * size(Number(dot.dataset.mass))}px`);
    }
    this.place.replaceChildren(
      element("figcaption", { textContent: "Mass against frequency, one point per token" }),
      this.#chart(),
    );
  }

  #chart() {
    const { labels, masses, counts } = this.run.vocabulary;
    const { share, size, low, high } = massScale(this.run);
    const points = labels.map((name, n) => ({
      x: counts[n] || NEVER,
      y: masses[n],
      name,
      color: massShade(share(masses[n])),
      size: 3.5 * size(masses[n]),
      told: `mass ${number(masses[n], 4)}, ${plain.format(counts[n])} times`,
    }));
    // names from the edges of the cloud inwards: heaviest, lightest, most and least frequent
    const last = labels.length - 1;
    const often = [...labels.keys()].sort((a, b) => counts[b] - counts[a]);
    const order = [...labels.keys()].flatMap((n) => [n, last - n, often[n], often[last - n]]);
    const most = counts.reduce((a, b) => Math.max(a, b), 1);
    const ticks = [NEVER, ...roundTicks("log", 1, most * 1.6)];
    return scatterChart({
      points,
      order: new Set(order),
      mark: 1,
      height: 490,
      x: {
        title: `times in ${this.run.isCorpus ? "the training text" : "this text"} (log)`,
        ...{ scale: "log", low: NEVER / 1.6, high: most * 1.6, ticks },
        write: (x) => (x < 1 ? "never" : plain.format(x)),
      },
      y: { title: "mass (log)", scale: "log", low: low / 1.03, high: high * 1.03 },
      label: `Mass against frequency of ${plural(labels.length, "token")}; the tables list the heaviest and the lightest.`,
    });
  }
}
