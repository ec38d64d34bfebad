// (g) The replicas of a cluster: how each one is, what it has to do and has cached, and where requests went.
import { ask, askJson } from "../api.js";
import { fill, h } from "../dom.js";
import { num, t } from "../i18n.js";

const COLUMNS = ["name", "state", "load", "running", "waiting", "kv", "cached", "ended"];
const GONE = 60_000; // milliseconds that a replica is still listed when it is there no more
const SAMPLE = /^minisgl:(\w+)\{.*\breplica="([^"]*)"\} (\S+)$/gm; // of the metrics of all replicas

/**
 * What a cluster tells of itself; null where a single server answers.
 * @param {?Object} before  what it told before
 * @param {AbortSignal} signal
 */
export async function clusterOf(before, signal) {
  const counts = countsOf(await (await ask("/metrics", { signal })).text());
  if (!counts.size) return null;
  const { replicas, requests, draining } = await askJson("/cluster", { signal });
  const now = Date.now();
  const names = new Set(replicas.map((one) => one.name));
  const there = replicas.map(({ name, load }) => ({ ...counts.get(name), name, load, seen: now, isThere: true }));
  const gone = (before?.replicas ?? []).filter((one) => !names.has(one.name) && now - one.seen < GONE)
    .map((one) => ({ ...one, load: 0, num_requests_running: 0, num_requests_waiting: 0, isThere: false }));
  const byName = (one, other) => (one.name < other.name ? -1 : 1);
  return { replicas: [...there.sort(byName), ...gone], requests, draining };
}

/** By a replica's name, the sums of its samples by their names; empty for a server that is no cluster. */
function countsOf(text) {
  const counts = new Map();
  for (const [, name, replica, value] of text.matchAll(SAMPLE)) {
    const own = counts.get(replica) ?? {};
    own[name] = (own[name] ?? 0) + Number(value);
    counts.set(replica, own);
  }
  return counts;
}

export class Replicas {
  /** @param {(name: string) => void} choose */
  constructor(choose) {
    this.choose = choose;
    this.rows = new Map(); // by name, so that buttons keep their focus
    this.body = h("tbody");
    const head = COLUMNS.map((name) => h("th",
      { scope: "col", text: t(`replicas.${name}`), title: t(`replicas.${name}.about`) }));
    const table = h("table", { class: "requests replicas" }, h("thead", {}, h("tr", {}, head)), this.body);
    this.totals = h("p", { class: "small muted" });
    this.root = h("div", { class: "scroll-x", tabindex: "0", role: "group", "aria-label": t("panel.replicas") }, table,
      this.totals);
  }

  update({ cluster, replica }) {
    if (!cluster) return;
    const all = cluster.replicas.reduce((sum, one) => sum + (one.request_success_total ?? 0), 0);
    const rows = cluster.replicas.map((one) => this.row(one, all, cluster.draining, one.name === replica));
    this.rows = new Map(rows.map((row) => [row.name, row]));
    if (rows.length !== this.body.children.length || rows.some(({ node }, at) => this.body.children[at] !== node))
      fill(this.body, rows.map(({ node }) => node));
    this.totals.textContent = t("replicas.totals", cluster.requests);
  }

  row(one, all, isDraining, isChosen) {
    const row = this.rows.get(one.name) ?? this.newRow(one.name);
    const [state, load, running, waiting, kv, cached, ended] = row.cells;
    const name = one.isThere ? (isDraining ? "draining" : "serving") : "gone";
    row.node.className = `${name}${isChosen ? " chosen" : ""}`;
    row.node.dataset.state = name;
    row.button.setAttribute("aria-pressed", String(isChosen));
    row.button.disabled = !one.isThere;
    state.textContent = t(`replicas.${name}`);
    load.textContent = num(one.load);
    running.textContent = num(one.num_requests_running ?? 0);
    waiting.textContent = num(one.num_requests_waiting ?? 0);
    kv.textContent = percent(one.kv_cache_usage_perc ?? 0, 1);
    cached.textContent = t("replicas.share", { part: num(one.prefix_cache_hits_total ?? 0),
      share: percent(one.prefix_cache_hits_total ?? 0, one.prompt_tokens_total ?? 0) });
    const requests = one.request_success_total ?? 0;
    ended.textContent = t("replicas.share", { part: num(requests), share: percent(requests, all) });
    ended.style.setProperty("--share", percent(requests, all));
    Object.assign(row.node.dataset, { load: one.load, ended: requests, cached: one.prefix_cache_hits_total ?? 0 });
    return row;
  }

  newRow(name) {
    const button = h("button", { type: "button", class: "text-button mono", onclick: () => this.choose(name) }, name);
    button.setAttribute("aria-label", t("replicas.look", { name }));
    const cells = COLUMNS.slice(1).map((column) => h("td", { class: column === "state" ? "" : `number ${column}` }));
    return { name, button, cells, node: h("tr", { "data-replica": name }, h("td", {}, button), cells) };
  }
}

/** Of a whole, as a rounded percentage. */
const percent = (part, whole) => `${Math.round((100 * part) / (whole || 1))}%`;
