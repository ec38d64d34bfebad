// What follows from two answers of /trace/live, or from the parts of one: rates, percentiles, and what waits where.
const WINDOW = 8; // answers that rates and percentiles are of

/** An answer with the ids of requests, and with those that wait for their grammar before the scheduler has them. */
export function liveOf(told) {
  const ids = new Map(told.outputs.map(({ uid, id }) => [uid, id]));
  const known = new Set(told.known);
  const away = told.outputs.filter(({ uid }) => !known.has(uid));
  const held = away.filter((one) => one.why && !one.num_output);
  const named = (one) => ({ ...one, id: ids.get(one.uid) ?? "", seconds: told.time - (one.since ?? told.time) });
  const queues = {
    api: told.outputs.length,
    tokenizer: away.filter((one) => !one.why && !one.num_output).length,
    scheduler: told.num_waiting + held.length,
    engine: told.num_inflight,
    detokenizer: away.filter((one) => one.num_output).length,
  };
  return { ...told, running: told.running.map(named), waiting: [...told.waiting, ...held].map(named), queues };
}

/** Rates and percentiles of the last states: `counts` of the last one, less those of one a while before. */
export function countersOf(states) {
  const [first, last] = [states.at(-WINDOW) ?? states[0], states.at(-1)];
  const seconds = Math.max(last.time - first.time, 1e-9);
  const gained = (name) => last.counts[name] - first.counts[name];
  return {
    tokens_per_s: gained("num_output") / seconds,
    ttft_ms: percentiles(last.counts.ttft, first.counts.ttft),
    itl_ms: percentiles(last.counts.itl, first.counts.itl),
  };
}

/** Of what a histogram of seconds has gained, in ms: the upper bounds of the buckets that they lie in; or null. */
function percentiles({ bounds, counts }, before) {
  let sum = 0;
  const gained = counts.map((count, index) => (sum += count - before.counts[index]));
  const of = (share) => 1000 * bounds[Math.min(bounds.length - 1, gained.findIndex((one) => one >= share * sum))];
  return sum > 0 ? { p50: of(0.5), p95: of(0.95) } : null;
}
