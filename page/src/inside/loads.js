// Loads to look at: each shows one mechanism within a minute, on the built-in model too.
import { ask, askJson, events } from "../api.js";

const WORDS = "The keeper of the lighthouse counts the ships that pass in the night and writes each one into a long list. ";
const QUESTIONS = ["What can you do?", "How are you?", "Tell me a short story.", "What is a radix tree?", "What is 2 plus 3?"];
const MAX_POOL = 16_384; // tokens: a larger pool takes too many requests to be filled

/** Send one chat, and read its answer to the end. Returns the request's id as soon as the answer begins. */
async function send(messages, options, signal, sent) {
  const body = { messages, stream: true, ...options };
  const response = await ask("/v1/chat/completions", { body, signal });
  sent(response.headers.get("x-request-id"));
  for await (const { data } of events(response)) if (data === "[DONE]") break;
}

const user = (content) => ({ role: "user", content });

/** A text of about so many tokens. */
async function textOf(numTokens) {
  const { count } = await askJson("/tokenize", { body: { prompt: WORDS } });
  return WORDS.repeat(Math.max(1, Math.floor(numTokens / count)));
}

/** Ends when one of them has written something, so that what is sent next meets running streams. */
const started = (sendAll) => new Promise((resolve, reject) => sendAll(resolve).catch(reject));

async function oneChat(_, go) {
  await go([user("Tell me a short story about a lighthouse.")], { max_tokens: 200 });
}

/** The first one leaves its prefix in the tree; fifteen others find it there. */
async function sharedPrefix(limits, go) {
  const system = { role: "system", content: await textOf(Math.min(512, limits.longest / 4)) };
  await go([system, user("Hello!")], { max_tokens: 8 });
  const rest = Array.from({ length: 15 }, (_, index) => [system, user(`${QUESTIONS[index % QUESTIONS.length]} (${index})`)]);
  await Promise.all(rest.map((messages) => go(messages, { max_tokens: 96, ignore_eos: true })));
}

/** Six streams decode; then a prompt of several budgets is computed in chunks, in the same steps. */
async function longPrompt(limits, go) {
  const wanted = Math.min(limits.budget * 4, limits.longest * 0.7);
  const content = await textOf(wanted);
  const streams = Array.from({ length: 6 }, (_, index) => [user(`Count to one thousand, ${index + 1} at a time.`)]);
  const options = { max_tokens: Math.floor(Math.min(600, limits.longest / 2)), ignore_eos: true };
  let running = [];
  await started(async (begun) => {
    running = streams.map((messages) => go(messages, options, begun));
    await Promise.all(running);
  });
  await Promise.all([...running, go([user(`${Math.random()} ${content}`)], { max_tokens: 16 })]);
}

/** Together they want more pages than there are: the youngest gives its own back, and is computed again later. */
async function retracted(limits, go) {
  const each = Math.floor(limits.longest * 0.6);
  const count = Math.min(limits.rows, 32, Math.max(4, Math.ceil((1.6 * limits.pool) / each)));
  const options = { max_tokens: each, ignore_eos: true };
  await Promise.all(Array.from({ length: count }, (_, index) => go([user(`Count to one thousand. (${index})`)], options)));
}

export const LOADS = { one: oneChat, shared: sharedPrefix, long: longPrompt, retracted };

/** What a server can take, from its `hello`. pool and longest: tokens. */
export function limitsOf({ limits }, modelLength) {
  const pool = limits.pages * limits.page_size;
  return { ...limits, pool, longest: Math.min(modelLength, pool) };
}

/** Whether the pool is small enough to be filled by a few requests. */
export const canRetract = (limits) => limits.pool <= MAX_POOL;

/**
 * Run one of `LOADS` to its end.
 * @param {(id: string) => void} sent  is told the id of each request that is sent
 */
export function runLoad(name, limits, signal, sent) {
  const go = (messages, options, begun = () => {}) =>
    send(messages, options, signal, (id) => {
      sent(id);
      begun();
    });
  return LOADS[name](limits, go);
}
