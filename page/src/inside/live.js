// What the server tells of itself while somebody looks: /trace/live, as one object that the panels draw.
import { ask, askJson, events } from "../api.js";

const MAX_STEPS = 512; // that are remembered
const MAX_STATES = 240; // four each second: one minute
const MAX_ENDED = 24; // requests that have ended and are still listed
const MAX_TRIES = 4;
const LATER = 500; // milliseconds in which several may end
const AGAIN = 2000; // milliseconds until a lost connection is tried again

/**
 * @typedef {{id: string, uid: number, numPrompt: number, numOutput: number, numCached: number, reason: string}} Ended
 */
export class Live {
  /** @param {(what: Set<string>) => void} changed  is told which of hello, state, tree, pool, status are new */
  constructor(changed) {
    this.changed = changed;
    this.status = "off"; // off, connecting, on, or the server's words why not
    this.hello = null;
    this.state = null;
    this.states = []; // for sparklines
    this.steps = [];
    this.numMixed = 0; // of all steps seen: those that both prefilled and decoded
    this.tree = { nodes: [], evicted: [], truncated: false };
    this.pool = null;
    this.ended = []; // the newest first
    this.asking = null;
    this.missing = new Map(); // by uid, of who has ended and is not listed yet: how often it was asked for
    this.known = new Map(); // by uid: what is running or waiting now
    this.fresh = new Set();
    this.controller = null;
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
        await this.loadPast(signal);
        const response = await ask("/trace/live", { signal });
        for await (const { name, data } of events(response)) this.take(name, JSON.parse(data));
        if (!signal.aborted) this.tell("status", "the stream has ended");
      } catch (error) {
        if (!signal.aborted) this.tell("status", error.message);
      }
      if (!signal.aborted) await new Promise((resume) => setTimeout(resume, AGAIN));
    }
  }

  /** Steps and requests of before. */
  async loadPast(signal) {
    const past = await askJson(`/trace?format=json&steps=256&requests=${MAX_ENDED}`, { signal });
    this.steps = [];
    this.numMixed = 0;
    this.addSteps(past.steps);
    this.ended = past.requests.flatMap(endedOf).reverse().slice(0, MAX_ENDED);
  }

  addSteps(steps) {
    const last = this.steps.at(-1)?.time ?? 0; // numbers begin anew when workers are started again
    const added = steps.filter((step) => step.time > last);
    this.steps = [...this.steps, ...added].slice(-MAX_STEPS);
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

  take(name, data) {
    if (name === "state") this.takeState(data);
    else if (name === "hello") this.hello = data;
    else if (name === "tree") this.tree = data;
    else if (name === "pool") this.pool = data;
    this.status = "on";
    this.tell(name);
  }

  takeState(state) {
    if (state.error) {
      this.state = { ...this.state, processes: state.processes, error: state.error };
      return;
    }
    this.addSteps(state.steps);
    const now = new Map([...state.running, ...state.waiting].map((one) => [one.uid, one]));
    // Who is quick comes and goes between two events: only the steps tell of them.
    const seen = [...this.known.keys(), ...state.steps.flatMap((step) => step.rows.map(([, uid]) => uid))];
    const listed = new Set(this.ended.map((one) => one.uid));
    for (const uid of seen) if (!now.has(uid) && !listed.has(uid) && !this.missing.has(uid)) this.missing.set(uid, 0);
    if (this.missing.size) this.loadEnded();
    this.known = now;
    this.state = state;
    this.states = [...this.states, state].slice(-MAX_STATES);
  }

  /** Ask who has ended of late, and how: not more often than once in a while. */
  loadEnded() {
    this.asking ??= setTimeout(async () => {
      try {
        const { requests } = await askJson(`/trace?format=json&steps=1&requests=${MAX_ENDED}`, { quiet: true });
        this.ended = requests.flatMap(endedOf).reverse().slice(0, MAX_ENDED);
        const found = new Set(this.ended.map((one) => one.uid));
        for (const [uid, tries] of this.missing) {
          if (found.has(uid) || tries === MAX_TRIES) this.missing.delete(uid);
          else this.missing.set(uid, tries + 1);
        }
        this.tell("state");
      } catch (error) {
        console.warn(error.message); // it is asked again when the next one ends
      }
      this.asking = null;
    }, LATER);
  }
}

export function isMixed(step) {
  return step.num_decode > 0 && step.rows.some(([, , , isPrefill]) => isPrefill);
}

function endedOf({ id, outputs }) {
  return outputs
    .filter((output) => output.state === "finished")
    .map(({ uid, num_prompt: numPrompt, num_output: numOutput, num_cached: numCached, reason,
      num_retractions: numRetractions }) => ({
      id, uid, numPrompt, numOutput, numCached, reason, numRetractions,
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
