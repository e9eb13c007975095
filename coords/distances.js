// Where sources are drawn by their distance: around the selected token, or along two axes.
//
// How far out a source is drawn is the logarithm of its softened distance sqrt(1 + r²), which the
// law raises to a power: equal steps outwards make the pull weaker by equal factors.
//
// Both have `origin`, where the token is, `radius`, `glow` around the origin, `farthest`: the
// largest distance, `at(source)`, `ring(distance)`: the curve of one distance, `ticks(distance)`:
// where its number stands, `edges`: lines around the picture, and `captions(size)`: [x, y, text,
// anchor] each.

const softened = (distance) => Math.log1p(distance ** 2) / 2;
const plainDistance = (x) => (x < 1000 ? String(x) : plain.format(x));
const largest = (values) => values.reduce((a, b) => Math.max(a, b), 0.3);
// The part of a squared distance that is time.
const lateness = ({ time, distance }, source) =>
  distance[source] ? (time[source] / distance[source]) ** 2 : 0;

class Circles {
  constructor({ distance }, [width, height], angles) {
    this.origin = [width / 2, height / 2];
    this.radius = Math.min(width, height) / 2 - 20;
    this.glow = 0.9 * this.radius;
    this.core = clamped(0.14 * this.radius, 24, 40); // where a distance of 0 is
    this.farthest = largest(distance);
    this.edges = "";
    Object.assign(this, { distance, angles });
  }

  out(distance) {
    const share = softened(distance) / softened(this.farthest);
    return this.core + (this.radius - this.core) * share;
  }

  at(source) {
    const [x, y] = this.origin;
    const [angle, out] = [this.angles[source], this.out(this.distance[source])];
    return [x + out * Math.cos(angle), y - out * Math.sin(angle)];
  }

  ring(distance) {
    const [x, y] = this.origin;
    const r = this.out(distance);
    return `M${x - r} ${y}a${r} ${r} 0 1 1 ${2 * r} 0a${r} ${r} 0 1 1 ${-2 * r} 0`;
  }

  ticks(distance) {
    return [[this.origin[0], this.origin[1] - this.out(distance)]];
  }

  captions([width, height]) {
    return [[width - 12, height - 12, "rings in softenings", "end"]];
  }
}

// The distance in space to the right, that in time upwards.
class Axes {
  constructor({ space, time }, [width, height]) {
    this.origin = [52, height - 52];
    this.size = [width - 52 - 34, height - 52 - 60];
    this.radius = Math.min(...this.size);
    this.glow = 0.6 * this.radius;
    this.far = [largest(space), largest(time)];
    this.farthest = Math.hypot(...this.far);
    const [x, y] = this.origin;
    this.edges = `M${x} ${y - this.size[1]}V${y}H${x + this.size[0]}`;
    Object.assign(this, { space, time });
  }

  #place(space, time) {
    const [across, up] = [space, time].map(
      (part, axis) => (this.size[axis] * softened(part)) / softened(this.far[axis]),
    );
    return [this.origin[0] + across, this.origin[1] - up];
  }

  at(source) {
    return this.#place(this.space[source], this.time[source]);
  }

  ring(distance) {
    const points = Array.from({ length: 65 }, (_, n) => {
      const angle = (n / 64) * (Math.PI / 2);
      return [distance * Math.cos(angle), distance * Math.sin(angle)];
    });
    const inside = points.filter(([space, time]) => space <= this.far[0] && time <= this.far[1]);
    return `M${inside.map((point) => this.#place(...point).join(" ")).join("L") || "0 0"}`;
  }

  ticks(distance) {
    const [x, y] = this.#place(distance, distance);
    return [
      ...(distance <= this.far[0] ? [[x, this.origin[1] + 11]] : []),
      ...(distance <= this.far[1] ? [[this.origin[0] - 15, y]] : []),
    ];
  }

  captions([width, height]) {
    return [
      [width - 12, height - 14, "distance in space, in softenings →", "end"],
      [12, 42, "↑ distance in time", "start"],
      [width - 12, 18, "curves: equal distance in all, so equal pull per mass", "end"],
    ];
  }
}
