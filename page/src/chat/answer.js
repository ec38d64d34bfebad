// One turn: sends a conversation to the server, and reads the answer as it streams.
import { ask, events } from "../api.js";
import { bodyOf } from "./settings.js";

/** The messages of a conversation as the API takes them. */
function history({ settings, messages }) {
  const sent = settings.system ? [{ role: "system", content: settings.system }] : [];
  for (const message of messages) {
    if (message.role === "user") sent.push({ role: "user", content: message.content });
    else if (message.calls?.length) {
      const calls = message.calls.map(({ id, name, arguments: given }) => ({
        id,
        type: "function",
        function: { name, arguments: given },
      }));
      sent.push({ role: "assistant", content: message.content || null, tool_calls: calls });
      for (const call of message.calls) sent.push({ role: "tool", tool_call_id: call.id, content: call.result ?? "" });
    } else if (message.content) sent.push({ role: "assistant", content: message.content });
  }
  return sent;
}

const tokenOf = ({ token, logprob, top_logprobs: top = [] }) => ({
  text: token,
  logprob,
  top: top.map((one) => ({ text: one.token, logprob: one.logprob })),
});

/** Add what a chunk of the stream says to the answer. */
function read(answer, chunk) {
  if (chunk.error) throw new Error(chunk.error.message);
  if (chunk.usage) {
    answer.stats.numPrompt = chunk.usage.prompt_tokens;
    answer.stats.numOutput = chunk.usage.completion_tokens;
    answer.stats.numCached = chunk.usage.prompt_tokens_details?.cached_tokens ?? 0;
  }
  const choice = chunk.choices?.[0];
  if (!choice) return false;
  const { content, reasoning_content: reasoning, tool_calls: calls = [] } = choice.delta ?? {};
  if (content) answer.content += content;
  if (reasoning) answer.reasoning += reasoning;
  for (const { index, id, function: called } of calls) {
    const call = (answer.calls[index] ??= { id: "", name: "", arguments: "" });
    if (id) call.id = id;
    if (called?.name) call.name = called.name;
    call.arguments += called?.arguments ?? "";
  }
  if (choice.logprobs?.content) answer.tokens.push(...choice.logprobs.content.map(tokenOf));
  if (choice.finish_reason) answer.stats.finish = choice.finish_reason;
  return Boolean(content || reasoning || calls.length || choice.logprobs?.content?.length);
}

/** @returns {import("./store.js").Message} */
export const newAnswer = () => ({
  role: "assistant", content: "", reasoning: "", calls: [], tokens: [], stats: {}, state: "streaming",
});

/**
 * Have the last message of a conversation, an answer from `newAnswer`, written.
 * @param {import("./store.js").Conversation} conversation
 * @param {AbortSignal} signal  ends it
 * @param {() => void} changed  is called whenever there is more of it
 */
export async function writeAnswer(conversation, signal, changed) {
  const answer = conversation.messages.at(-1);
  const before = { ...conversation, messages: conversation.messages.slice(0, -1) };
  const begin = performance.now();
  let last = begin;
  try {
    const body = { ...bodyOf(conversation.settings), messages: history(before) };
    const response = await ask("/v1/chat/completions", { body, signal });
    answer.stats.requestId = response.headers.get("x-request-id");
    for await (const { data } of events(response)) {
      if (data === "[DONE]") break;
      if (read(answer, JSON.parse(data))) {
        last = performance.now();
        answer.stats.firstToken ??= (last - begin) / 1000;
        answer.stats.decodeSeconds = (last - begin) / 1000 - answer.stats.firstToken;
      }
      changed();
    }
    answer.state = answer.stats.finish ? "done" : "failed";
    if (!answer.stats.finish) answer.error = "the connection was closed before the answer ended";
  } catch (error) {
    answer.state = signal.aborted ? "stopped" : "failed";
    if (!signal.aborted) answer.error = error.message;
  }
  changed();
}
