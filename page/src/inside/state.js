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

/**
 * Of what a histogram of seconds has gained, in ms, or null. Values lie evenly in their bucket, as Prometheus'
 * `histogram_quantile` has it, but none is longer than the sum of all leaves it; a single one is that sum.
 */
function percentiles({ bounds, counts, total }, before) {
  const lower = (index) => bounds[index - 1] ?? 0;
  const gained = counts.map((count, index) => count - before.counts[index]);
  const num = gained.reduce((sum, count) => sum + count, 0);
  const seconds = total - before.total;
  const spare = seconds - gained.reduce((sum, count, index) => sum + count * lower(index), 0);
  const of = (share) => {
    let rank = share * num;
    const index = gained.findIndex((count) => (rank -= count) <= 0);
    const within = ((bounds[index] ?? lower(index)) - lower(index)) * (1 + rank / gained[index]);
    return 1000 * (num === 1 ? seconds : lower(index) + Math.min(within, spare));
  };
  return num > 0 ? { p50: of(0.5), p95: of(0.95) } : null;
}
