// (b) The steps as a strip that scrolls: a column for each step, a line for each row of the batch. A column in which
// the colours of decode and prefill stand is a mixed step: some requests decode while another's prompt is computed,
// chunk by chunk.
import { ask } from "../api.js";
import { h, icon, saveFile } from "../dom.js";
import { num, t } from "../i18n.js";
import { isMixed, sized, themed } from "./live.js";

const COLUMN = 12; // pixels
const BATCH = 280; // pixels of the rows together
const LINES = [8, 28]; // pixels that one of them may have
const HEAD = 44; // pixels of the bars above, which show a step's tokens
const MAX_LINES = 32;

export class Strip {
  constructor() {
    this.canvas = h("canvas", { class: "strip", role: "img" });
    this.about = h("p", { class: "small strip-about" });
    const key = (name) => h("span", { class: "key" }, h("i", { class: name }), t(`strip.${name}`));
    const save = h("button", { type: "button", class: "text-button", onclick: savePerfetto }, icon("save"),
      t("strip.perfetto"));
    this.root = h("div", {}, this.canvas,
      h("div", { class: "legend small muted" }, key("prefill"), key("decode"), key("verify"), save), this.about);
    this.pointed = null; // the step that the pointer is at
    this.canvas.addEventListener("pointermove", (event) => this.point(event));
    this.canvas.addEventListener("pointerleave", () => {
      this.pointed = null;
      this.tell();
    });
  }

  point(event) {
    const fromEnd = Math.floor((this.canvas.clientWidth - event.offsetX) / COLUMN);
    this.pointed = this.steps?.at(-1 - fromEnd) ?? null;
    this.tell();
  }

  update({ steps, numMixed, server }) {
    this.steps = steps;
    const { canvas, root } = this;
    root.dataset.steps = steps.length;
    root.dataset.mixed = numMixed;
    root.dataset.last = steps.at(-1)?.step ?? "";
    const shown = steps.slice(-Math.ceil((canvas.clientWidth || 600) / COLUMN));
    const lines = Math.min(MAX_LINES, Math.max(8, ...shown.flatMap((step) => step.rows.map(([row]) => row + 1))));
    const height = Math.max(LINES[0], Math.min(LINES[1], Math.floor(BATCH / lines)));
    const context = sized(canvas, HEAD + BATCH + 4);
    const budget = Math.max(server?.max_prefill_length ?? 1, ...shown.map((step) => step.num_tokens));
    const colours = ["decode", "prefill", "verify"].map(themed); // by kind of a row
    context.fillStyle = themed("line");
    context.fillRect(0, HEAD - 1, canvas.clientWidth, 1);
    shown.forEach((step, index) =>
      this.draw(context, step, canvas.clientWidth - (shown.length - index) * COLUMN, budget, colours, height));
    this.tell();
  }

  draw(context, step, x, budget, colours, line) {
    // The tokens of a step, on a scale on which one token is still seen beside a full budget.
    const scale = (tokens) => ((HEAD - 4) * Math.log1p(tokens)) / Math.log1p(budget);
    const height = scale(step.num_tokens);
    let left = step.num_tokens; // each bar stands before those of the kinds that were
    for (const kind of [1, 2, 0]) {
      const tall = left && Math.max(3, (height * left) / step.num_tokens);
      context.fillStyle = colours[kind];
      context.fillRect(x + 1, HEAD - 2 - tall, COLUMN - 3, tall);
      left -= tokensOf(step, kind);
    }
    for (const [row, , , kind] of step.rows) {
      if (row >= MAX_LINES) continue;
      context.fillStyle = colours[kind];
      context.fillRect(x + 1, HEAD + 3 + row * line, COLUMN - 3, line - 2);
    }
  }

  /** The step that is pointed at, or the newest, in words. */
  tell() {
    const step = this.pointed ?? this.steps?.at(-1);
    const words = step ? describe(step) : t("strip.none");
    this.about.textContent = words;
    this.canvas.setAttribute("aria-label", t("strip.label", { words }));
  }
}

/** The steps and requests of late as a file for ui.perfetto.dev. */
async function savePerfetto() {
  const trace = await ask("/trace?format=perfetto&steps=2048&requests=1024");
  saveFile("minisgl-trace.json", "application/json", await trace.text());
}

const ofKind = (step, wanted) => step.rows.filter(([, , , kind]) => kind === wanted);
const tokensOf = (step, kind) => ofKind(step, kind).reduce((sum, [, , count]) => sum + count, 0);

function describe(step) {
  const parts = [t("strip.step", { n: num(step.step) })];
  if (step.num_decode) parts.push(t("strip.decodes", { n: num(step.num_decode) }));
  for (const [kind, name] of [[1, "strip.chunks"], [2, "strip.verified"]]) {
    const n = ofKind(step, kind).length;
    if (n) parts.push(t(name, { n: num(n), tokens: num(tokensOf(step, kind)) }));
  }
  if (isMixed(step)) parts.push(t("strip.mixed"));
  if (step.device_ms !== null) parts.push(t("strip.time",
    { device: num(step.device_ms, 1), host: num(step.host_ms, 1) }));
  return parts.join(" · ");
}
