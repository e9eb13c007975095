// Small charts as SVG, which draw themselves at the width that the page gives them.
//
// lineChart({ series, x, y, label, height, tell }) → an element: lines, a legend whose names can be
//   pressed to highlight a line, and the value under the pointer.
//   series: [{ name, points: [[x, y], ...], color, dash, width }], dash as in stroke-dasharray.
//   tell(series, [x, y]) → the text beside the pointer; by default name, value and place.
// scatterChart({ points, x, y, label, height, order, mark }) → an element: points with names where
//   names fit. points: [{ x, y, name, color, size, told }]; `order`: indices of the points, those
//   whose names matter most first; `mark`: a value of y with a line of its own.
// An axis, x or y: { title, scale: "linear" (default) | "log" | "log1p", low, high, ticks, write }.
//   low and high are by default what the data span, ticks round values, write(value) its text.
//   log1p is log(1 + value), for distances that start at 0. label says what the chart shows.
//
//   lineChart({
//     series: rows.map((values, head) => ({ ...headLine(head), name: `head ${head + 1}`, points })),
//     x: { title: "tokens back (log)", scale: "log1p" },
//     y: { title: "share of the pull (log)", scale: "log", low: 1e-4, high: 1 },
//     label: "Measured pull by distance in time",
//   })

// Pixels: the height by default, the margins for titles and ticks, how near the pointer must be to
// a point to tell of it; and how many names a scatter chart has at most.
const CHART = { height: 300, left: 58, right: 14, top: 10, bottom: 44, reach: 40, names: 90 };

const svgElement = (name, attributes = {}, ...children) => {
  const made = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.append(...children);
  return made;
};

const measuring = document.createElement("canvas").getContext("2d");
const textWidth = (text, font) => {
  if (measuring.font !== font) measuring.font = font;
  return measuring.measureText(text).width;
};

// Whether a box [left, top, right, bottom] overlaps none of the others.
const isFree = (box, others) =>
  !others.some(
    (other) => box[0] < other[2] && other[0] < box[2] && box[1] < other[3] && other[1] < box[3],
  );

const SCALES = {
  linear: (x) => x,
  log: Math.log10,
  log1p: (x) => Math.log10(1 + x),
};

// Round values between two others: in steps of 1, 2 or 5 times a power of ten; on a log axis powers
// of ten, or 1, 2 and 5 times them if there are few.
const roundTicks = (scale, low, high) => {
  if (scale === "linear") {
    const rough = (high - low) / 5;
    const power = 10 ** Math.floor(Math.log10(rough));
    const step = power * [1, 2, 5, 10].find((x) => x * power >= rough * 0.999);
    const first = Math.ceil(low / step - 1e-9);
    const count = Math.floor(high / step + 1e-9) - first + 1;
    return Array.from({ length: count }, (_, n) => Number(((first + n) * step).toPrecision(12)));
  }
  const [from, to] = [Math.floor(Math.log10(Math.max(low, 1e-12))), Math.log10(high)];
  const powers = Array.from({ length: Math.floor(to) - from + 1 }, (_, n) => from + n);
  const times = (factors) =>
    powers
      .flatMap((power) => factors.map((x) => Number(`${x}e${power}`)))
      .filter((x) => x >= low * 0.999 && x <= high * 1.001);
  if (scale === "log1p") return [...(low <= 0 ? [0] : []), ...times([1, 3]).filter((x) => x >= 1)];
  const found = [[1], [1, 2, 5]].map(times).find((ticks) => ticks.length > 2);
  return found ?? roundTicks("linear", low, high);
};

const tickText = (x) =>
  Math.abs(x) >= 1000 ? plain.format(x) : String(Number(x.toPrecision(3)));

// An axis between two pixels: `at` a value, and its `ticks`, [pixel, text] each.
const axisBetween = (given, values, from, to) => {
  const { scale = "linear", write = tickText } = given;
  const of = SCALES[scale];
  const known = values.filter((x) => x !== null && Number.isFinite(of(x)));
  let low = given.low ?? known.reduce((a, b) => Math.min(a, b), known[0] ?? 1);
  let high = given.high ?? known.reduce((a, b) => Math.max(a, b), known[0] ?? 1);
  if (!(high > low)) [low, high] = [low - Math.abs(low) / 2, low + (Math.abs(low) / 2 || 1)];
  const ticks = given.ticks ?? roundTicks(scale, low, high);
  // what is far outside stays a number that SVG can draw
  const at = (value) => {
    const pixel = from + ((of(value) - of(low)) / (of(high) - of(low))) * (to - from);
    return Math.max(-1e4, Math.min(1e4, Number.isNaN(pixel) ? from : pixel));
  };
  return { at, ticks: ticks.map((value) => [at(value), write(value)]) };
};

// The frame of a chart: an SVG with axes, in it the `plot` that cuts off what is outside.
const chartFrame = ({ x, y, label }, xs, ys, width, height) => {
  const { left, right, top, bottom } = CHART;
  const [end, base] = [Math.max(left + 40, width - right), height - bottom];
  const across = axisBetween(x, xs, left, end);
  const up = axisBetween(y, ys, base, top);
  const text = (name, x, y, content, anchor = "middle", more = {}) =>
    svgElement("text", { class: name, x, y, "text-anchor": anchor, ...more }, content);
  const line = (x1, y1, x2, y2) => svgElement("line", { class: "grid", x1, y1, x2, y2 });
  // a tick whose text would touch the one before keeps its line only
  let free = -Infinity;
  const texts = across.ticks.flatMap(([at, content]) => {
    const half = textWidth(content, `11px ${css("--font")}`) / 2 + 4;
    if (at - half < free) return [];
    free = at + half;
    return [text("tick", Math.min(at, width - half + 2), base + 16, content)];
  });
  const middle = (top + base) / 2;
  // the size of a nested SVG cuts off what is outside; its coordinates are those of the chart
  const plot = svgElement("svg", {
    ...{ class: "plot", x: left, y: top, width: end - left, height: base - top },
    viewBox: `${left} ${top} ${end - left} ${base - top}`,
  });
  const picture = svgElement(
    "svg",
    { class: "picture", role: "img", "aria-label": label ?? "", width, height },
    ...across.ticks.map(([at]) => line(at, top, at, base)),
    ...up.ticks.map(([at]) => line(left, at, end, at)),
    ...texts,
    ...up.ticks.map(([at, content]) => text("tick", left - 6, at + 4, content, "end")),
    text("axis", (left + end) / 2, height - 6, x.title),
    text("axis", 13, middle, y.title, "middle", { transform: `rotate(-90 13 ${middle})` }),
    plot,
  );
  return { picture, plot, across, up, end };
};

// A chart: `paint(width, height)` returns the picture and the points that the pointer can find,
// [{ at: [x, y], told }]. Drawn again if the width changes.
const chartElement = (paint, height, ...before) => {
  const tooltip = element("div", { className: "tooltip", hidden: true });
  const place = element("div", { className: "place" });
  const node = element("div", { className: "chart" }, ...before, place, tooltip);
  let [found, width] = [[], 0];
  const draw = () => {
    width = place.clientWidth;
    if (!width) return;
    const { picture, points } = paint(width, height);
    found = points;
    place.replaceChildren(picture);
  };
  const tell = ({ offsetX, offsetY }) => {
    let [nearest, least] = [null, CHART.reach];
    for (const point of found) {
      const far = Math.hypot(point.at[0] - offsetX, point.at[1] - offsetY);
      if (far < least) [nearest, least] = [point, far];
    }
    tooltip.hidden = nearest === null;
    if (nearest === null) return;
    tooltip.replaceChildren(...[nearest.told()].flat());
    const left = nearest.at[0] - tooltip.offsetWidth / 2;
    tooltip.style.left = `${Math.max(0, Math.min(left, width - tooltip.offsetWidth))}px`;
    const top = place.offsetTop + nearest.at[1];
    const above = top - tooltip.offsetHeight - 10;
    tooltip.style.top = `${above > 0 ? above : top + 14}px`;
  };
  place.addEventListener("pointermove", (event) => {
    // offsetX counts from the element under the pointer
    const box = place.getBoundingClientRect();
    tell({ offsetX: event.clientX - box.left, offsetY: event.clientY - box.top });
  });
  place.addEventListener("pointerleave", () => (tooltip.hidden = true));
  new ResizeObserver(() => place.clientWidth !== width && draw()).observe(place);
  return { node, draw };
};

const lineChart = ({ series, height = CHART.height, ...given }) => {
  const tell = given.tell ?? (({ name }, [x, y]) => `${name}: ${number(y)} at ${number(x)}`);
  let chosen = null;
  const paint = (width) => {
    const every = series.flatMap(({ points }) => points);
    const [xs, ys] = [0, 1].map((n) => every.map((point) => point[n]));
    const { picture, plot, across, up } = chartFrame(given, xs, ys, width, height);
    const shown = series.map((one) => ({
      ...one,
      places: one.points.map(([x, y]) => (y === null ? null : [across.at(x), up.at(y)])),
    }));
    plot.append(
      ...shown.map(({ places, color, dash = "", width: thick = 2 }, n) =>
        svgElement("path", {
          d: places
            .map((at, n) => at && `${n && places[n - 1] ? "L" : "M"}${at.map((x) => x.toFixed(1))}`)
            .filter(Boolean)
            .join(""),
          ...{ stroke: color, "stroke-width": n === chosen ? thick + 1 : thick, fill: "none" },
          ...{ "stroke-dasharray": dash, "stroke-linejoin": "round" },
          opacity: chosen === null || n === chosen ? 1 : 0.15,
        }),
      ),
    );
    const points = shown
      .filter((_, n) => chosen === null || n === chosen)
      .flatMap((one) =>
        one.places.flatMap((at, n) => (at ? [{ at, told: () => tell(one, one.points[n]) }] : [])),
      );
    return { picture, points };
  };
  const buttons = series.map(({ name, color, dash = "" }, n) => {
    const stroke = { stroke: color, "stroke-width": 2.5, "stroke-dasharray": dash };
    const sample = svgElement("line", { x1: 0, y1: 5, x2: 24, y2: 5, ...stroke });
    const onclick = () => {
      chosen = chosen === n ? null : n;
      buttons.forEach((button, n) => button.setAttribute("aria-pressed", String(n === chosen)));
      draw();
    };
    const made = element("button", { type: "button", className: "series", onclick });
    made.append(svgElement("svg", { width: 24, height: 10, "aria-hidden": "true" }, sample), name);
    made.setAttribute("aria-pressed", "false");
    return made;
  });
  const { node, draw } = chartElement(
    paint,
    height,
    element("div", { className: "series-names" }, ...buttons),
  );
  return node;
};

// The names of points beside, above or below them, where they cover no other name and no point.
const chartNames = (points, places, order, width) => {
  const cell = 4; // pixels: what is covered is kept as squares
  const key = (x, y) => Math.floor(y / cell) * 10000 + Math.floor(x / cell);
  const covered = new Set(places.map(([x, y]) => key(x, y)));
  const font = `11px ${css("--font")}`;
  const names = [];
  for (const n of order) {
    if (names.length >= CHART.names) break;
    const [[x, y], name] = [places[n], cut(points[n].name)];
    const [gap, wide] = [(points[n].size ?? 3.5) + 4, textWidth(name, font)];
    const spots = [
      [x + gap, y + 4],
      [x - gap - wide, y + 4],
      [x - wide / 2, y - gap],
      [x - wide / 2, y + gap + 9],
    ];
    const squares = ([left, base]) => {
      const found = [];
      for (let down = base - 9; down < base + 3 + cell; down += cell)
        for (let at = left - 2; at < left + wide + 2 + cell; at += cell) found.push(key(at, down));
      return found;
    };
    const isInside = ([left, base]) => left > CHART.left && left + wide < width && base > 10;
    const isOpen = (spot) => isInside(spot) && !squares(spot).some((one) => covered.has(one));
    const spot = spots.find(isOpen);
    if (!spot) continue;
    squares(spot).forEach((one) => covered.add(one));
    names.push(svgElement("text", { class: "name", x: spot[0], y: spot[1] }, name));
  }
  return names;
};

const scatterChart = ({ points, order = points.keys(), mark, height = CHART.height, ...given }) => {
  const paint = (width) => {
    const ys = [...points.map(({ y }) => y), ...(mark === undefined ? [] : [mark])];
    const xs = points.map(({ x }) => x);
    const { picture, plot, across, up, end } = chartFrame(given, xs, ys, width, height);
    if (mark !== undefined) {
      const at = up.at(mark);
      plot.append(
        svgElement("line", { class: "mark-line", x1: CHART.left, y1: at, x2: end, y2: at }),
      );
    }
    const places = points.map(({ x, y }) => [across.at(x), up.at(y)]);
    plot.append(
      ...points.map(({ color, size = 3.5 }, n) => {
        const [cx, cy] = places[n];
        return svgElement("circle", { class: "point", cx, cy, r: size, fill: color });
      }),
    );
    picture.append(...chartNames(points, places, order, width));
    return {
      picture,
      points: points.map(({ name, told }, n) => ({
        at: places[n],
        told: () => [chip(name), " ", told],
      })),
    };
  };
  return chartElement(paint, height).node;
};
