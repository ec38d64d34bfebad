// Conversations live in the browser (IndexedDB), and nowhere else.

/**
 * @typedef {Object} Message
 * @property {"user"|"assistant"} role
 * @property {string} content
 * @property {string} [reasoning]
 * @property {{id: string, name: string, arguments: string, result?: string}[]} [calls]
 * @property {Token[]} [tokens]  with log-probabilities, if they were asked for
 * @property {Object} [stats]  what stands under an answer
 * @property {"streaming"|"done"|"stopped"|"failed"} [state]  of an answer
 * @property {string} [error]
 *
 * @typedef {{text: string, logprob: number, top: {text: string, logprob: number}[]}} Token
 *
 * @typedef {Object} Conversation
 * @property {string} id
 * @property {string} title  "" until the first message is sent
 * @property {number} updated  milliseconds since 1970
 * @property {Object} settings  see `chat/settings.js`
 * @property {Message[]} messages
 */

const STORE = "conversations";

const asPromise = (request) =>
  new Promise((resolve, reject) => {
    request.onsuccess = () => resolve(request.result);
    request.onerror = () => reject(request.error);
  });

let opened = null;
function database() {
  if (!opened) {
    const request = indexedDB.open("minisgl", 1);
    request.onupgradeneeded = () => request.result.createObjectStore(STORE, { keyPath: "id" });
    opened = asPromise(request);
  }
  return opened;
}

async function run(mode, what) {
  try {
    return await asPromise(what((await database()).transaction(STORE, mode).objectStore(STORE)));
  } catch (error) {
    console.warn("conversations cannot be kept in this browser:", error); // a private window, or a full disk
    return undefined;
  }
}

/** All conversations, the newest first. What streamed when the page was left has stopped. */
export async function loadConversations() {
  const all = (await run("readonly", (store) => store.getAll())) ?? [];
  for (const conversation of all)
    for (const message of conversation.messages) if (message.state === "streaming") message.state = "stopped";
  return all.sort((a, b) => b.updated - a.updated);
}

export const saveConversation = (conversation) => run("readwrite", (store) => store.put(conversation));
export const deleteConversation = (id) => run("readwrite", (store) => store.delete(id));

/** @returns {Conversation} */
export const newConversation = (settings) => ({
  id: crypto.randomUUID?.() ?? `${Date.now()}-${Math.random()}`, // only pages from https and localhost have the first
  title: "",
  updated: Date.now(),
  settings: { ...settings },
  messages: [],
});

/** A conversation as Markdown, for people. */
export function asMarkdown({ title, settings, messages }) {
  const parts = [`# ${title}`];
  if (settings.system) parts.push(`**system**\n\n${settings.system}`);
  for (const message of messages) {
    parts.push(`**${message.role}**\n\n${message.content}`);
    for (const call of message.calls ?? []) parts.push(`\`\`\`json\n${call.name}(${call.arguments})\n\`\`\``);
  }
  return `${parts.join("\n\n")}\n`;
}

/** What to call a conversation that begins with these words. */
export function titleOf(text) {
  const line = text.trim().replace(/\s+/g, " ");
  return line.length > 48 ? `${line.slice(0, 47)}…` : line;
}
