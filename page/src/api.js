// How the page talks to the server: with a key where one is asked for, in JSON, or in server-sent events.
import { askKey } from "./key.js";

const KEY = "api-key"; // kept as long as the tab is open

/** What the server answered where it did not do as asked. */
export class ApiError extends Error {
  constructor(status, message, code) {
    super(message);
    Object.assign(this, { status, code });
  }
}

function headersFor(body, more) {
  const key = sessionStorage.getItem(KEY);
  return { ...more, ...(key ? { authorization: `Bearer ${key}` } : {}),
    ...(body ? { "content-type": "application/json" } : {}) };
}

async function errorOf(response) {
  let told = {};
  try {
    told = (await response.json()).error ?? {};
  } catch {
    // No JSON: it is a proxy that answers.
  }
  return new ApiError(response.status, told.message ?? `${response.status} ${response.statusText}`, told.code);
}

/**
 * Ask the server. Where it wants a key that it does not know yet, the person is asked for one, and it is asked again.
 * @param {string} path
 * @param {{body?: Object, headers?: Object, signal?: AbortSignal, quiet?: boolean}} options  body: makes it a POST.
 *   quiet: ask nobody.
 * @returns {Promise<Response>}
 * @throws {ApiError}
 */
export async function ask(path, { body, headers, signal, quiet = false } = {}) {
  for (;;) {
    const key = sessionStorage.getItem(KEY);
    const response = await fetch(path, {
      method: body ? "POST" : "GET",
      headers: headersFor(body, headers),
      body: body && JSON.stringify(body),
      signal,
      cache: "no-store",
    });
    if (response.ok) return response;
    const error = await errorOf(response);
    const lacksKey = response.status === 401 || error.code === "admin_key_required";
    if (!lacksKey || quiet) throw error;
    if (sessionStorage.getItem(KEY) !== key) continue; // somebody else has asked meanwhile
    const given = await askKey(error.message, key !== null);
    if (!given) throw error;
    sessionStorage.setItem(KEY, given);
  }
}

export const askJson = async (path, options) => (await ask(path, options)).json();

/**
 * A stream of server-sent events, one after the other: `{ name, data }`. Comments, which keep connections alive, are
 * passed over.
 * @param {Response} response
 */
export async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  let data = [];
  let name = "message";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    const lines = (rest + value).split(/\r?\n/);
    rest = lines.pop();
    for (const line of lines) {
      if (line.startsWith("data:")) data.push(line.slice(5).replace(/^ /, ""));
      else if (line.startsWith("event:")) name = line.slice(6).trim();
      else if (line === "" && data.length) {
        yield { name, data: data.join("\n") };
        data = [];
        name = "message";
      }
    }
  }
}
