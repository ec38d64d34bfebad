// (d) The pool of KV pages: a cell for each page, coloured by whom it belongs to.
import { h } from "../dom.js";
import { num, t } from "../i18n.js";
import { colourOf, sized, themed } from "./live.js";

const FREE = -1;
const CACHED = -2;
const SHARED = -3;

export class Pool {
  constructor() {
    this.canvas = h("canvas", { class: "pool", role: "img" });
    const key = (name) => h("span", { class: "key" }, h("i", { class: name }), t(`pool.${name}`));
    const legend = h("div", { class: "legend small muted" }, ["free", "cached", "shared", "owned"].map(key));
    this.about = h("p", { class: "small" });
    this.root = h("div", {}, this.canvas, legend, this.about);
  }

  update({ pool, state }) {
    const pages = state?.pages;
    if (pages) {
      const values = { used: num(pages.used), cached: num(pages.cached), free: num(pages.free) };
      this.about.textContent = t("pool.about", { ...values, size: num(pool?.pages_per_cell ?? 1) });
      Object.assign(this.root.dataset, pages);
    }
    if (!pool) return;
    this.canvas.setAttribute("aria-label", this.about.textContent);
    const numCells = pool.runs.reduce((sum, [, count]) => sum + count, 0);
    const width = this.canvas.clientWidth || 300;
    const size = Math.max(5, Math.min(18, Math.floor(Math.sqrt((width * 190) / Math.max(1, numCells)))));
    const perLine = Math.max(1, Math.floor(width / size));
    const context = sized(this.canvas, Math.ceil(numCells / perLine) * size);
    const colours = { [FREE]: themed("raised"), [CACHED]: themed("cached-soft"), [SHARED]: themed("cached") };
    let cell = 0;
    for (const [owner, count] of pool.runs) {
      context.fillStyle = colours[owner] ?? colourOf(owner);
      for (const end = cell + count; cell < end; cell++)
        context.fillRect((cell % perLine) * size, Math.floor(cell / perLine) * size, size - 1, size - 1);
    }
  }
}
