// (e) Numbers of the last minute, as lines.
import { fill, h } from "../dom.js";
import { num, t } from "../i18n.js";

const WIDTH = 120;
const HEIGHT = 32;
const milliseconds = (value) => `${num(value, value < 10 ? 1 : 0)} ms`;
// Name, what is drawn of a state (null where there is nothing), how it is written, and a second line.
const LINES = [
  ["waiting", (state) => state.num_waiting, num],
  ["running", (state) => state.num_running, num],
  ["speed", (state) => state.counters.tokens_per_s, num],
  ["ttft", (state) => state.counters.ttft_ms?.p50, milliseconds, (state) => state.counters.ttft_ms?.p95],
  ["itl", (state) => state.counters.itl_ms?.p50, milliseconds, (state) => state.counters.itl_ms?.p95],
];

export class Sparks {
  constructor() {
    this.tiles = LINES.map(([name, of, write, upper]) => {
      const value = h("strong", { text: "–" });
      const line = h("svg:polyline", { class: "line" });
      const second = h("svg:polyline", { class: "line upper" });
      const svg = h("svg:svg",
        { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, preserveAspectRatio: "none", "aria-hidden": "true" }, second, line);
      const note = h("span", { class: "small muted" });
      const tile = h("div", { class: "spark", "data-spark": name },
        h("span", { class: "small muted", text: t(`spark.${name}`) }), h("span", {}, value, " ", note), svg);
      return { tile, value, line, second, note, of, write, upper };
    });
    this.root = h("div", { class: "sparks" }, this.tiles.map(({ tile }) => tile));
  }

  update({ states }) {
    for (const { value, line, second, note, of, write, upper } of this.tiles) {
      const values = states.map(of);
      const uppers = upper ? states.map(upper) : [];
      const top = Math.max(1, ...[...values, ...uppers].filter((one) => typeof one === "number"));
      line.setAttribute("points", points(values, top));
      second.setAttribute("points", points(uppers, top));
      const last = values.findLast((one) => typeof one === "number");
      value.textContent = last === undefined ? "–" : write(last);
      const lastUpper = uppers.findLast((one) => typeof one === "number");
      fill(note, lastUpper === undefined ? null : t("spark.p95", { value: write(lastUpper) }));
    }
  }
}

function points(values, top) {
  const step = WIDTH / Math.max(1, 239);
  const start = WIDTH - (values.length - 1) * step;
  return values
    .map((value, index) => (typeof value === "number"
      ? `${(start + index * step).toFixed(1)},${(HEIGHT - 2 - (value / top) * (HEIGHT - 4)).toFixed(1)}` : ""))
    .filter((point) => point)
    .join(" ");
}
