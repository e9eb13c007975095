// In words: what pulled a token most, and whether because it is near, recent or heavy.
//
// The rule: the strongest source is compared with the middle one (median) of all sources of the
// token. It is near in space, or recent, if that part of its distance alone would make the middle
// source pull at least twice as strongly; it is heavy at 1.1 times the middle mass.

const WORTH = 2;
const HEAVY = 1.1;
const FEW = 8; // tokens back that are still recent
const WEAK = 0.1; // a share of the pull
const RULE =
  "Near in space, or recent: that part of its distance alone makes the pull at least twice that " +
  "of the middle source (median). Heavy: at least 1.1 times the middle mass.";

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

// Where the strongest source is, compared with the middle of all. `strength` is the field at a
// distance.
const whereItIs = (orbit, source, token, strength) => {
  const [space, time] = [orbit.space, orbit.time].map(medianOf);
  const usual = strength(Math.hypot(space, time));
  const isWorth = (one, other) => {
    const pull = strength(Math.hypot(one, other));
    return pull > 0 && pull >= WORTH * usual;
  };
  const isNear = isWorth(orbit.space[source], time);
  const isRecent = isWorth(space, orbit.time[source]);
  const far = number(orbit.distance[source], 2);
  const told = `(${far} softenings, the middle source ${number(medianOf(orbit.distance), 2)})`;
  const back = token - source;
  const ago = back ? `, ${plural(back, "token")} back` : "";
  const recent = back > FEW ? "near in time" : "recent";
  if (isNear && isRecent) return `it is near in space and ${recent} ${told}${ago}`;
  if (isRecent) return `it is ${recent} ${told}${ago}`;
  if (isNear) return `it is near in space ${told}${ago.replace(",", back > 1 ? ", though" : ",")}`;
  if (isWorth(orbit.space[source], orbit.time[source])) return `it is near ${told}${ago}`;
  return `it is at no special distance ${told}${ago}`;
};

const whatItsMassDoes = (run, mass, heavier) => {
  if (run.attention.massInValue) return "in this model masses do not change the pull";
  if (heavier >= HEAVY) return `its mass of ${number(mass)} adds`;
  if (heavier <= 1 / HEAVY) return `its mass of only ${number(mass)} takes some away`;
  return `its mass of ${number(mass)} is ordinary`;
};

// The sentence and what comes after it in small print, two lists of nodes and texts.
const whyPulled = ({ run, layer, head, token, orbit, shares, quiet }) => {
  const sources = [...shares.keys()];
  const best = sources.reduce((a, b) => (shares[b] > shares[a] ? b : a));
  const silence =
    quiet === null ? "" : `Quiet ${percent(quiet)} (the background's share).`;
  if (!(shares[best] > 0))
    return [["Nothing reaches it: no source is within this head's radius."], [silence]];
  if (run.count === 1) return [["The text is one token, which only pulls itself."], [silence]];
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
  const strength = (distance) => fieldAt(run.attention, radius, distance);
  const usual = strength(middle);
  const worth = [
    usual
      ? `${factor(strength(orbit.distance[best]) / usual)} by distance`
      : "it is out of reach",
    ...(run.attention.massInValue ? [] : [`${factor(heavier)} by mass`]),
  ];
  return [
    [
      ...who,
      `${share}: ${whereItIs(orbit, best, token, strength)}; `,
      `${whatItsMassDoes(run, mass, heavier)}.`,
    ],
    [`Against the middle source: ${worth.join(", ")}. ${silence}`],
  ];
};
