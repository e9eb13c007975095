// The camera of the map: a turntable that the mouse, fingers and keys move, and its projection.

class Camera {
  static #first = { turn: Math.PI / 4, tilt: 0.41, zoom: 1, right: 0, down: 0 };
  static #eye = 4; // distance of the eye, in half widths of the longest axis
  static #edge = 40; // pixels around the box, for the names of the axes

  constructor() {
    this.room = 1; // pixels per half width of the longest axis, without zoom
    this.reset();
  }

  reset() {
    Object.assign(this, Camera.#first);
  }

  // Text for the address: angles in radians around the upright axis and above the horizon, the
  // zoom, and how far the picture is shifted.
  get text() {
    const { turn, tilt, zoom, right, down } = this;
    return [turn, tilt, zoom, right, down].map((x) => Number(x.toFixed(4))).join(",");
  }

  restore(text) {
    const found = text.split(",").map(Number);
    if (found.length !== 5 || !found.every(Number.isFinite)) return;
    [this.turn, this.tilt, this.zoom, this.right, this.down] = found;
    this.move(0, 0);
    this.zoomBy(1, 0, 0);
  }

  move(turn, tilt) {
    this.turn = (this.turn + turn) % (2 * Math.PI);
    this.tilt = Math.max(-1.5, Math.min(1.5, this.tilt + tilt));
  }

  // The point at (x, y), in pixels from the middle of the picture, stays where it is.
  zoomBy(factor, x, y) {
    const zoom = Math.max(0.4, Math.min(40, this.zoom * factor));
    this.right = x / this.room - ((x / this.room - this.right) * zoom) / this.zoom;
    this.down = y / this.room - ((y / this.room - this.down) * zoom) / this.zoom;
    this.zoom = zoom;
    if (zoom <= 1) this.right = this.down = 0;
  }

  // A function from a point to [x, y, depth, size]: pixels of the picture, how near the eye the
  // point is in half widths of the longest axis, and how much larger than in the middle of the box.
  projection({ middle, half }, width, height) {
    const { turn, tilt, zoom } = this;
    const longest = Math.max(...half);
    // the whole box fits into the picture in the first view, and however it is turned from there
    const wide = Math.hypot(half[0], half[1]) / longest;
    const [cos, sin] = [Math.cos(Camera.#first.tilt), Math.sin(Camera.#first.tilt)];
    const tall = cos * (half[2] / longest) + sin * wide;
    const depth = cos * wide - sin * (half[2] / longest); // of the lowest corner, which is in front
    const [above, below] = [-1, 1].map((n) => (tall * Camera.#eye) / (Camera.#eye - n * depth));
    const across = (width / 2 - Camera.#edge) / wide;
    const upright = (height - 1.5 * Camera.#edge) / (above + below);
    this.room = Math.max(10, Math.min(across, upright));
    const scale = zoom * this.room;
    const left = width / 2 + this.right * this.room; // of the middle of the box, as `top`
    const top = height / 2 + this.down * this.room - ((below - above) / 2) * scale;
    this.middle = [left, top, scale].map((x) => Number(x.toFixed(3)));
    const [cosTurn, sinTurn] = [Math.cos(turn), Math.sin(turn)];
    const [cosTilt, sinTilt] = [Math.cos(tilt), Math.sin(tilt)];
    return (point) => {
      const [x, y, z] = point.map((value, axis) => (value - middle[axis]) / longest);
      const toward = cosTurn * x + sinTurn * y;
      const depth = cosTilt * toward + sinTilt * z;
      // places of earlier layers may lie outside a fitted box, even behind the eye
      const size = Camera.#eye / Math.max(0.3, Camera.#eye - depth);
      const side = (cosTurn * y - sinTurn * x) * size * scale;
      const up = (cosTilt * z - sinTilt * toward) * size * scale;
      return [left + side, top - up, depth, size];
    };
  }

  // Let pointers and the wheel on `surface` move the camera: `moved()` after each step, `rested()`
  // at the end of a movement. One finger or button turns, two fingers zoom and shift, as does Shift
  // with the button.
  follow(surface, moved, rested) {
    const pointers = new Map();
    let resting = null;
    const restSoon = () => {
      clearTimeout(resting);
      resting = setTimeout(rested, 250);
    };
    const fromMiddle = ([x, y]) => {
      const { left, top, width, height } = surface.getBoundingClientRect();
      return [x - left - width / 2, y - top - height / 2];
    };
    surface.addEventListener("pointerdown", (event) => {
      pointers.set(event.pointerId, [event.clientX, event.clientY]);
      surface.setPointerCapture(event.pointerId);
      if (pointers.size === 1) this.travelled = 0;
    });
    surface.addEventListener("pointermove", (event) => {
      const before = pointers.get(event.pointerId);
      if (!before) return;
      const now = [event.clientX, event.clientY];
      const [dx, dy] = now.map((x, n) => x - before[n]);
      pointers.set(event.pointerId, now);
      this.travelled += Math.hypot(dx, dy);
      const other = [...pointers].find(([id]) => id !== event.pointerId)?.[1];
      if (other) {
        const far = (point) => Math.max(20, Math.hypot(point[0] - other[0], point[1] - other[1]));
        this.zoomBy(far(now) / far(before), ...fromMiddle(other));
        this.shift(dx / 2, dy / 2);
      } else if (event.shiftKey) this.shift(dx, dy);
      else this.move(-0.008 * dx, 0.008 * dy);
      moved();
      restSoon();
    });
    // one finger that moves up or down scrolls the page, two never do
    const keepTwo = (event) => event.touches.length > 1 && event.preventDefault();
    for (const name of ["touchstart", "touchmove"])
      surface.addEventListener(name, keepTwo, { passive: false });
    for (const name of ["pointerup", "pointercancel"])
      surface.addEventListener(name, (event) => pointers.delete(event.pointerId));
    surface.addEventListener(
      "wheel",
      (event) => {
        event.preventDefault();
        const lines = event.deltaMode ? 20 : 1;
        const at = fromMiddle([event.clientX, event.clientY]);
        this.zoomBy(Math.exp(-0.0015 * lines * event.deltaY), ...at);
        moved();
        restSoon();
      },
      { passive: false },
    );
  }

  shift(right, down) {
    this.right += right / this.room;
    this.down += down / this.room;
  }

  // Whether a key moved the camera.
  key({ key, shiftKey }) {
    const turns = {
      ArrowLeft: [-0.15, 0],
      ArrowRight: [0.15, 0],
      ArrowUp: [0, 0.1],
      ArrowDown: [0, -0.1],
    };
    if (shiftKey && turns[key]) this.move(...turns[key]);
    else if (key === "+") this.zoomBy(1.1, 0, 0);
    else if (key === "-") this.zoomBy(1 / 1.1, 0, 0);
    else if (key === "0") this.reset();
    else return false;
    return true;
  }
}
