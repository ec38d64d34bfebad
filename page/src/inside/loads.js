// Loads to look at: each shows one mechanism within a minute, on the built-in model too.
//
// A browser opens six connections to a server, and one of them is the live view's. So what shall run together comes in
// one HTTP request with several prompts: to the scheduler each of them is a request of its own.
import { ask, askJson, events } from "../api.js";

const WORDS =
  "The keeper of the lighthouse counts the ships that pass in the night and writes each one into a long list. ";
const QUESTIONS = ["What can you do?", "How are you?", "Tell me a short story.", "What is a radix tree?",
  "What is 2 plus 3?"];
const MAX_POOL = 4096; // tokens: a larger pool takes too many requests, and too long, to be filled

const user = (content) => ({ role: "user", content });
const times = (count, make) => Promise.all(Array.from({ length: count }, (_, index) => make(index)));

/** The ids of a chat, as its template has them. */
const idsOf = async (...messages) => (await askJson("/tokenize", { body: { messages } })).tokens;

/** A text of about so many tokens. */
async function textOf(numTokens) {
  const { count } = await askJson("/tokenize", { body: { prompt: WORDS } });
  return WORDS.repeat(Math.max(1, Math.floor(numTokens / count)));
}

/** What sends requests, and reads their answers to the end. sent: is told the id of each. */
class Sender {
  constructor(signal, sent) {
    this.signal = signal;
    this.sent = sent;
  }

  chat = (messages, options) => this.post("/v1/chat/completions", { messages, ...options });

  /** Several prompts, as ids. begun: is called when the first of their tokens is there. */
  prompts = (prompt, options, begun) => this.post("/v1/completions", { prompt, ignore_eos: true, ...options }, begun);

  async post(path, body, begun = () => {}) {
    const response = await ask(path, { body: { ...body, stream: true }, signal: this.signal });
    this.sent(response.headers.get("x-request-id"));
    for await (const { data } of events(response)) {
      if (data === "[DONE]") return;
      const { error } = JSON.parse(data);
      if (error) throw new Error(error.message);
      begun();
    }
  }
}

async function oneChat(_, sender) {
  await sender.chat([user("Tell me a short story about a lighthouse.")], { max_tokens: 200 });
}

/** The first one leaves its prefix in the tree; fifteen others find it there. */
async function sharedPrefix(limits, sender) {
  const system = { role: "system", content: await textOf(Math.min(512, limits.longest / 4)) };
  const others = await times(15, (index) => idsOf(system, user(`${QUESTIONS[index % QUESTIONS.length]} (${index})`)));
  await sender.prompts([await idsOf(system, user("Hello!"))], { max_tokens: 8 });
  await sender.prompts(others, { max_tokens: 96 });
}

/** Some streams decode; then a prompt of several budgets is computed in chunks, in the same steps. */
async function longPrompt(limits, sender) {
  const wanted = Math.min(limits.budget * 4, limits.longest * 0.7);
  const long = await idsOf(user(`${Math.random()} ${await textOf(wanted)}`)); // a number that no prefix begins with
  const count = (index) => idsOf(user(`Count to one thousand, ${index + 1} at a time.`));
  const streams = await times(numStreams(limits), count);
  const options = { max_tokens: Math.floor(Math.min(320, limits.longest / 2)) };
  await new Promise((resolve, reject) => {
    let after = null;
    const begun = () => (after ??= sender.prompts([long], { max_tokens: 16 }));
    sender.prompts(streams, options, begun).then(() => resolve(after), reject);
  });
}

/** Together they want more pages than there are: the youngest gives its own back, and is computed again later. */
async function retracted(limits, sender) {
  const each = Math.floor(limits.longest * 0.6);
  const count = Math.min(limits.rows, 32, Math.max(4, Math.ceil((1.6 * limits.pool) / each)));
  await sender.prompts(await times(count, (index) => idsOf(user(`Count to one thousand. (${index})`))),
    { max_tokens: each });
}

/** How many streams the long prompt comes amid: one row is its own. */
export const numStreams = ({ rows }) => Math.max(1, Math.min(6, rows - 1));

export const LOADS = { one: oneChat, shared: sharedPrefix, long: longPrompt, retracted };

/** What a server can take, from its settings. pool and longest: tokens. */
export function limitsOf({ num_pages: pages, page_size: size, max_running_requests: rows, max_prefill_length: budget },
  modelLength) {
  return { rows, budget, pool: pages * size, longest: Math.min(modelLength, pages * size) };
}

/** Whether the pool is small enough to be filled by a few requests. */
export const canRetract = (limits) => limits.pool <= MAX_POOL;

/**
 * Run one of `LOADS` to its end.
 * @param {(id: string) => void} sent  is told the id of each HTTP request
 */
export const runLoad = (name, limits, signal, sent) => LOADS[name](limits, new Sender(signal, sent));
