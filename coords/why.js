// In words: what pulled a token most, and whether because it is near, recent or heavy.
//
// The rule: the strongest source is compared with the middle one (median) of all sources of the
// token, by distance in all, in space and in time, and by mass. Near is at most 0.8 of the middle
// distance, heavy at least 1.1 times the middle mass. What that is worth follows from the law.

const NEAR = 0.8;
const HEAVY = 1.1;
const FEW = 8; // tokens back that are still recent
const WEAK = 0.1; // a share of the pull
const LEAST_TIME = 0.3; // of the middle distance
const RULE =
  "Compared with the middle (median) of all sources: near is at most 0.8 of its distance, " +
  "heavy at least 1.1 times its mass.";

const medianOf = (values) => {
  const sorted = Float64Array.from(values).sort();
  const half = sorted.length >> 1;
  return sorted.length % 2 ? sorted[half] : (sorted[half - 1] + sorted[half]) / 2;
};
// How strong a head pulls at a distance, of mass 1; gravity/law.py has the formula.
const fieldAt = ({ exponent, cutoff }, radius, distance) => {
  const r2 = distance ** 2;
  const within = cutoff === "none" ? 1 : Math.max(0, 1 - r2 / radius ** 2);
  return (1 + r2) ** -exponent * (cutoff === "hard" ? Math.ceil(within) : within ** 2);
};
const factor = (x) => (x >= 1000 ? "over 1,000\u00a0×" : `${number(x, 2)}\u00a0×`);

// Where the strongest source is, compared with the middle of all. Time is no reason in a head whose
// distances have next to no part of time.
const whereItIs = (orbit, source, token) => {
  const middle = (part) => medianOf(orbit[part]);
  const isNear = (part) => orbit[part][source] <= NEAR * middle(part);
  const usual = `the middle source ${number(middle("distance"), 2)}`;
  const far = `${number(orbit.distance[source], 2)} softenings, ${usual}`;
  const back = token - source;
  const ago = back ? `${plural(back, "token")} back` : "no token back";
  const isRecent = isNear("time") && middle("time") > LEAST_TIME * middle("distance");
  if (!isNear("distance")) return `it is at no special distance (${far}), ${ago}`;
  if (isRecent && isNear("space"))
    return `it is near in space and ${back > FEW ? "in time" : "recent"} (${far}), ${ago}`;
  if (isRecent) return `it is ${back > FEW ? "near in time" : "recent"} (${ago}), and so at ${far}`;
  return `it is near in space (${far})${back ? `, ${back > 1 ? "though " : ""}${ago}` : ""}`;
};

const whatItsMassDoes = (run, mass, heavier) => {
  if (run.attention.massInValue) return "in this model masses do not change the pull";
  if (heavier >= HEAVY) return `its mass of ${number(mass)} adds`;
  if (heavier <= 1 / HEAVY) return `its mass of only ${number(mass)} takes some of that away`;
  return `its mass of ${number(mass)} is ordinary`;
};

// The sentence and what comes after it in small print, two lists of nodes and texts.
const whyPulled = ({ run, layer, head, token, orbit, shares, quiet }) => {
  const sources = [...shares.keys()];
  const best = sources.reduce((a, b) => (shares[b] > shares[a] ? b : a));
  const silence =
    quiet === null
      ? ""
      : `Quiet ${percent(quiet)} (the background's share).`;
  if (run.count === 1) return [["The text is one token, which only pulls itself."], [silence]];
  if (!(shares[best] > 0))
    return [["Nothing reaches it: no source is within this head's radius."], [silence]];
  if (!token)
    return [["The first token: nothing comes before it, so it only pulls itself."], [silence]];
  const name = best === token ? "it itself" : chip(run.labels[best]);
  const who =
    shares[best] < WEAK
      ? ["Many pull it a little, ", name, " most"]
      : best === token
        ? ["It pulls itself most"]
        : [name, " pulls most"];
  const share = ` (${percent(shares[best])})`;
  const middle = medianOf(orbit.distance);
  if (run.kind === "published")
    return [
      [
        ...who,
        `${share}, from ${number(orbit.distance[best], 2)} away; `,
        `the middle source is at ${number(middle, 2)}.`,
      ],
      ["Under the published law distance alone does not decide: its score repels what is near."],
    ];
  const mass = run.mass[best];
  const heavier = mass / medianOf(sources.map((source) => run.mass[source]));
  const { radius } = run.attention.heads[layer - 1][head];
  const [near, usual] = [orbit.distance[best], middle].map((distance) =>
    fieldAt(run.attention, radius, distance),
  );
  const worth = [
    usual ? `${factor(near / usual)} by distance` : "the middle source is out of reach",
    ...(run.attention.massInValue ? [] : [`${factor(heavier)} by mass`]),
  ];
  return [
    [
      ...who,
      `${share}: ${whereItIs(orbit, best, token)}; ${whatItsMassDoes(run, mass, heavier)}.`,
    ],
    [`Against the middle source: ${worth.join(", ")}. ${silence}`],
  ];
};
