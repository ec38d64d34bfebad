// What the server tells of itself while somebody looks: /trace/live, as one object that the panels draw.
import { ApiError, askJson } from "../api.js";
import { clusterOf } from "./replicas.js";
import { countersOf, liveOf } from "./state.js";

const MAX_STEPS = 512; // that are remembered
const MAX_STATES = 240; // four each second: one minute
const MAX_ENDED = 24; // requests that have ended and are still listed
const MAX_TRIES = 4;
const INTERVAL = 250; // milliseconds between two looks; each second one is at the tree and the pages, too
const CLUSTER_EVERY = 4; // looks: each fourth one is at all replicas, too
const LATER = 500; // milliseconds in which several may end
const AGAIN = 2000; // milliseconds until a lost connection is tried again

/**
 * @typedef {{id: string, uid: number, numPrompt: number, numOutput: number, numCached: number, reason: string}} Ended
 */
export class Live {
  /** @param {(what: Set<string>) => void} changed  is told what is new: server, cluster, state, tree, pool, status */
  constructor(changed) {
    this.changed = changed;
    this.status = "off"; // off, connecting, on, or the server's words why not
    this.server = null; // its settings, as /server_info tells them
    this.cluster = null; // its replicas, where the server is one
    this.replica = ""; // the one that is looked into
    this.asking = null;
    this.forget();
    this.fresh = new Set();
    this.controller = null;
  }

  /** All that one server has told. */
  forget() {
    this.state = null;
    this.states = []; // for sparklines
    this.steps = [];
    this.numMixed = 0; // of all steps seen: those that both prefilled and decoded
    this.tree = { nodes: [], evicted: [], truncated: false };
    this.treeJson = "";
    this.stamp = 0; // of the tree: what was used later is a hit
    this.pool = null;
    this.ended = []; // the newest first
    this.missing = new Map(); // by uid, of who has ended and is not listed yet: how often asked for, and last seen as
    this.known = new Map(); // by uid: what is running or waiting now
  }

  /** Look into another replica of the cluster. */
  choose(name) {
    this.replica = name;
    this.forget();
    const isWatching = Boolean(this.controller);
    this.watch(false);
    this.watch(isWatching);
  }

  /** What makes a cluster ask the replica that is looked into. */
  get headers() {
    return this.replica ? { "x-replica": this.replica } : {};
  }

  /** Look, or look away: nobody's work is watched for a page that nobody sees. */
  watch(isWatching) {
    if (isWatching === Boolean(this.controller)) return;
    this.controller?.abort();
    this.controller = isWatching ? new AbortController() : null;
    if (isWatching) this.run(this.controller.signal);
    else this.tell("status", "off");
  }

  async run(signal) {
    while (!signal.aborted) {
      this.tell("status", "connecting");
      try {
        await this.loadCluster(signal);
        await this.loadPast(signal);
        for (let count = 1; !signal.aborted; count++) {
          if (this.cluster && count % CLUSTER_EVERY === 0) await this.loadCluster(signal);
          const last = this.steps.at(-1);
          const since = last ? last.step + (last.device_ms === null ? -1 : 1) : 0; // its times come later
          const path = `/trace/live?since=${Math.max(0, since)}&whole=${count % 2}`;
          this.take(await askJson(path, { headers: this.headers, signal, quiet: true }));
          await new Promise((resume) => setTimeout(resume, INTERVAL));
        }
      } catch (error) {
        if (!signal.aborted) this.tell("status", error.message);
      }
      if (!signal.aborted) await new Promise((resume) => setTimeout(resume, AGAIN));
    }
  }

  /** The replicas; where the one that was looked into is gone, another one is. */
  async loadCluster(signal) {
    try {
      this.cluster = await clusterOf(this.cluster, signal);
    } catch (error) {
      if (!(error instanceof ApiError)) throw error; // a replica that ends gives no answer: what was known stays
    }
    const names = this.cluster?.replicas.filter((one) => one.isThere).map((one) => one.name) ?? [];
    if (this.cluster && !names.includes(this.replica)) {
      this.replica = names[0] ?? "";
      this.forget();
    }
    this.tell("cluster");
  }

  /** Settings, and steps and requests of before. */
  async loadPast(signal) {
    this.server = await askJson("/server_info", { headers: this.headers, signal });
    const past = await askJson(`/trace?format=json&steps=256&requests=${MAX_ENDED}`,
      { headers: this.headers, signal });
    this.steps = [];
    this.numMixed = 0;
    this.addSteps(past.steps);
    this.ended = past.requests.flatMap(endedOf).reverse().slice(0, MAX_ENDED);
  }

  addSteps(steps) {
    const last = this.steps.at(-1)?.time ?? 0; // numbers begin anew when workers are started again
    const added = steps.filter((step) => step.time > last);
    this.steps = [...this.steps.filter((step) => !(step.time >= steps[0]?.time)), ...steps].slice(-MAX_STEPS);
    this.numMixed += added.filter(isMixed).length;
    return added;
  }

  tell(what, value) {
    if (what === "status") this.status = value;
    this.fresh.add(what);
    if (this.frame) return;
    // Together, and never more often than the screen is drawn.
    this.frame = requestAnimationFrame(() => {
      this.frame = 0;
      const fresh = this.fresh;
      this.fresh = new Set();
      this.changed(fresh);
    });
  }

  take(told) {
    this.status = "on";
    this.takeTree(told.tree);
    this.pool = told.pool ?? this.pool;
    this.takeState(liveOf(told));
    for (const what of ["server", "state", "tree", "pool"]) this.tell(what);
  }

  takeTree(tree) {
    const json = JSON.stringify(tree) ?? this.treeJson;
    if (json === this.treeJson) return;
    const ids = new Set(tree.nodes.map((node) => node.id));
    for (const node of tree.nodes) node.hit = node.stamp > this.stamp;
    this.stamp = Math.max(this.stamp, ...tree.nodes.map((node) => node.stamp));
    this.tree = { ...tree, evicted: this.tree.nodes.filter((node) => !ids.has(node.id)) };
    this.treeJson = json;
  }

  takeState(state) {
    this.addSteps(state.steps);
    const now = new Map([...state.running, ...state.waiting].map((one) => [one.uid, one]));
    // Who is quick comes and goes between two events: only the steps tell of them.
    const seen = [...this.known.keys(), ...state.steps.flatMap((step) => step.rows.map(([, uid]) => uid))];
    const listed = new Set(this.ended.map((one) => one.uid));
    for (const uid of seen) if (!now.has(uid) && !listed.has(uid) && !this.missing.has(uid))
      this.missing.set(uid, { tries: 0, last: this.known.get(uid) });
    if (this.missing.size) this.loadEnded();
    this.known = now;
    this.state = state;
    this.states = [...this.states, state].slice(-MAX_STATES);
    state.counters = countersOf(this.states);
  }

  /** Ask who has ended of late, and how: not more often than once in a while. */
  loadEnded() {
    this.asking ??= setTimeout(async () => {
      const { missing } = this; // those of the replica that is asked
      try {
        const { requests } = await askJson(`/trace?format=json&steps=1&requests=${MAX_ENDED}`,
          { headers: this.headers, quiet: true });
        if (missing === this.missing) { // else another replica was chosen meanwhile
          this.ended = requests.flatMap(endedOf).reverse().slice(0, MAX_ENDED);
          const found = new Set(this.ended.map((one) => one.uid));
          for (const [uid, one] of missing)
            if (found.has(uid) || one.tries++ === MAX_TRIES) missing.delete(uid);
          this.tell("state");
        }
      } catch (error) {
        console.warn(error.message); // it is asked again when the next one ends
      }
      this.asking = null;
    }, LATER);
  }
}

export function isMixed(step) {
  return step.num_decode > 0 && step.rows.some(([, , , kind]) => kind === 1);
}

function endedOf({ id, outputs }) {
  return outputs
    .filter((output) => output.reason !== null)
    .map(({ uid, num_prompt: numPrompt, num_output: numOutput, num_cached: numCached, reason,
      num_retractions: numRetractions, num_accepted: numAccepted }) => ({
      id, uid, numPrompt, numOutput, numCached, reason, numRetractions, numAccepted,
    }));
}

/** The colour of a request, in the pool and beside its name. */
export const colourOf = (uid) =>
  `hsl(${(uid * 67 + 20) % 360} 52% ${document.documentElement.dataset.theme === "dark" ? 62 : 48}%)`;

/** A colour of the page's, for what is drawn on a canvas. */
export const themed = (name) => getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();

/** A canvas that is as large as its box, and sharp. Returns its context, in CSS pixels. */
export function sized(canvas, height) {
  const width = canvas.clientWidth;
  const scale = devicePixelRatio || 1;
  if (canvas.width !== Math.round(width * scale) || canvas.height !== Math.round(height * scale)) {
    canvas.width = Math.round(width * scale);
    canvas.height = Math.round(height * scale);
    canvas.style.height = `${height}px`;
  }
  const context = canvas.getContext("2d");
  context.setTransform(scale, 0, 0, scale, 0, 0);
  context.clearRect(0, 0, width, height);
  return context;
}
