// (f) Who runs, who waits and why, and who has just ended. Each opens its eight stages.
import { fill, h } from "../dom.js";
import { duration, num, t, tOr } from "../i18n.js";
import { colourOf } from "./live.js";

const MAX_SHOWN = 40;

export class Requests {
  /** @param {(one: {id: string, uid: number}) => void} open */
  constructor(open) {
    this.open = open;
    this.body = h("tbody");
    const head = ["id", "state", "prompt", "tokens",
      "pages"].map((name) => h("th", { scope: "col", text: t(`requests.${name}`) }));
    this.table = h("table", { class: "requests" }, h("thead", {}, h("tr", {}, head)), this.body);
    this.root = h("div", { class: "table", tabindex: "0" }, this.table);
    this.rows = new Map(); // by uid, so that buttons keep their focus
    this.replica = ""; // whose uids these are
    this.chosen = "";
  }

  update({ state, ended, missing, known, replica }) {
    if (replica !== this.replica) this.rows = new Map();
    this.replica = replica;
    const leaving = [...missing.values()].flatMap(({ last }) => (last && !known.has(last.uid) ? [last] : []));
    const rows = [
      ...(state?.waiting ?? []).map((one) => ({ ...one, kind: "waiting" })),
      ...(state?.running ?? []).map((one) => ({ ...one, kind: "running" })),
      ...leaving.map((one) => ({ ...one, kind: "leaving" })), // how it ended is being asked
      ...ended.filter((one) => !state?.running.some(({ uid }) => uid === one.uid)).map((one) =>
        ({ ...one, kind: "ended" })),
    ].slice(0, MAX_SHOWN);
    const shown = rows.map((row) => this.row(row));
    this.rows = new Map(shown.map((row) => [row.uid, row]));
    const nodes = shown.length ? shown.map((row) => row.node)
      : [h("tr", {}, h("td", { colspan: 5, class: "muted", text: t("requests.none") }))];
    if (nodes.length !== this.body.children.length
      || nodes.some((node, index) => this.body.children[index] !== node)) fill(this.body, nodes);
    const waits = (state?.waiting ?? []).map((one) => one.why).filter((why) => why);
    this.root.dataset.waits = [...new Set([...(this.root.dataset.waits ?? "").split(" "), ...waits])].join(" ").trim();
  }

  row(one) {
    const row = this.rows.get(one.uid) ?? this.newRow(one);
    const [name, state, prompt, tokens, pages] = row.cells;
    row.node.className = `${one.kind}${String(one.uid) === this.chosen ? " chosen" : ""}`;
    name.setAttribute("aria-expanded", String(String(one.uid) === this.chosen));
    state.textContent = stateOf(one);
    state.title = one.kind === "waiting" ? tOr(`why.${one.why}.about`, "") : "";
    prompt.textContent = num(one.num_prompt ?? one.numPrompt ?? one.num_tokens ?? 0);
    tokens.textContent = one.kind === "running" ? num(Math.max(0, one.num_tokens - one.num_prompt))
      : one.kind === "ended" ? num(one.numOutput) : "";
    pages.textContent = one.pages === undefined || one.kind === "leaving" ? "" : num(one.pages);
    return row;
  }

  newRow(one) {
    const chip = h("i", { class: "chip", style: { background: colourOf(one.uid) } });
    const name = h("button", { type: "button", class: "text-button mono", onclick: () => this.open(one) }, chip,
      ` #${one.uid}`);
    name.setAttribute("aria-label", t("requests.open", { uid: one.uid }));
    const cells = Array.from({ length: 4 }, (_, index) => h("td", index ? { class: "number" } : {}));
    const node = h("tr", { "data-uid": one.uid, "data-id": one.id }, h("td", {}, name), cells);
    return { uid: one.uid, node, cells: [name, ...cells] };
  }
}

function stateOf(one) {
  if (one.kind === "running") return t(`state.${one.state}`);
  if (one.kind === "leaving") return t("state.leaving");
  if (one.kind === "waiting") {
    const parts = [t("state.waiting", { time: duration(one.seconds), why: tOr(`why.${one.why}`, one.why ?? "–") })];
    if (one.retracted) parts.push(t("state.retracted"));
    return parts.join(" · ");
  }
  const parts = [tOr(`finish.${one.reason}`, one.reason)];
  if (one.numCached) parts.push(t("state.cached", { n: num(one.numCached) }));
  if (one.numAccepted) parts.push(t("state.accepted", { n: num(one.numAccepted) }));
  if (one.numRetractions) parts.push(t("state.retractions", { n: num(one.numRetractions) }));
  return parts.join(" · ");
}
