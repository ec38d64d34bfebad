// Markdown to HTML, in a worker: whatever a model writes, only this thread can be kept busy by it, and the page ends it
// when it takes too long. What comes out is not trusted either: `text/view.js` sanitises it.
import { Marked } from "marked";
import temml from "temml";
import { escapeHtml, highlight } from "./highlight.js";

const MAX_BLOCK = 60_000; // characters that are read as Markdown; a longer block is shown as it is
const MAX_DEPTH = 24; // of lists and quotations in one another
const MAX_MATH = 4_000;

function math(source, displayMode) {
  if (source.length <= MAX_MATH) {
    try {
      const options = { displayMode, throwOnError: true, maxSize: [20, 20], maxExpand: 200 };
      // Without its inline styles, which the page's policy forbids; quotation marks in values are escaped.
      const html = temml.renderToString(source, options).replace(/ style="[^"]*"/g, "");
      return displayMode ? `<div class="math">${html}</div>` : html;
    } catch {
      // Half of a formula while it streams, or none at all: its source is shown.
    }
  }
  return displayMode ? `<pre class="math-source">${escapeHtml(source)}</pre>` : `<code>${escapeHtml(source)}</code>`;
}

/** `$…$`, `$$…$$`, `\(…\)` and `\[…\]`. A dollar before a space, or with a digit after it, is money. */
const mathBlock = {
  name: "mathBlock",
  level: "block",
  start: (source) => source.match(/(^|\n) {0,3}(\$\$|\\\[)/)?.index,
  tokenizer(source) {
    const match = /^ {0,3}(?:\$\$([^]{1,4000}?)\$\$|\\\[([^]{1,4000}?)\\\])[ \t]*(?:\n|$)/.exec(source);
    return match && { type: "mathBlock", raw: match[0], source: match[1] ?? match[2] };
  },
  renderer: (token) => math(token.source, true),
};
const mathInline = {
  name: "mathInline",
  level: "inline",
  start: (source) => source.match(/\$|\\[([]/)?.index,
  tokenizer(source) {
    const match =
      /^\$\$([^$\n]{1,2000})\$\$/.exec(source) ??
      /^\$((?! )[^$\n]{1,1000}(?<! ))\$(?!\d)/.exec(source) ??
      /^\\\(([^\n]{1,1000}?)\\\)/.exec(source) ??
      /^\\\[([^\n]{1,1000}?)\\\]/.exec(source);
    return match && { type: "mathInline", raw: match[0], source: match[1] };
  },
  renderer: (token) => math(token.source, false),
};

const isSafe = (href) => /^(https?:|mailto:)/i.test(href);
const marked = new Marked({ gfm: true, breaks: true, async: false });
marked.use({
  extensions: [mathBlock, mathInline],
  renderer: {
    // A model's own HTML is text like any other, and its pictures are links: the page loads nothing that it names.
    html: ({ text }) => escapeHtml(text),
    image({ href, text }) {
      const label = escapeHtml(text || href);
      return isSafe(href) ? `<a href="${escapeHtml(href)}">${label}</a>` : label;
    },
    link({ href, tokens }) {
      const label = this.parser.parseInline(tokens);
      return isSafe(href) ? `<a href="${escapeHtml(href)}">${label}</a>` : label;
    },
    code({ text, lang }) {
      const name = /^[\w+#.-]{1,20}/.exec(lang ?? "")?.[0] ?? "";
      return `<pre><code class="lang-${escapeHtml(name)}">${highlight(text, name.toLowerCase())}</code></pre>`;
    },
    checkbox: ({ checked }) => (checked ? "☑ " : "☐ "),
  },
});

/** Whether lists or quotations are nested more deeply than a page can show. */
function isTooDeep(tokens, depth) {
  if (depth > MAX_DEPTH) return true;
  return tokens.some((token) => isTooDeep(token.items ?? token.tokens ?? [], depth + 1));
}

const plain = (text) => `<pre class="plain">${escapeHtml(text)}</pre>`;

/** One string of HTML for each block of the text, so that the page can keep those that stay the same. */
function blocks(text) {
  // Of a line that begins with very many marks of quotations or lists, each is a level that parsers descend into.
  if (/^(?:[ \t]*(?:[>*+-]|\d{1,9}[.)])){25}/m.test(text) || /[^\n]{60001}/.test(text)) return [plain(text)];
  return marked
    .lexer(text)
    .filter((token) => token.type !== "space")
    .map((token) =>
      (token.raw.length > MAX_BLOCK || isTooDeep([token], 0) ? plain(token.raw) : marked.parser([token])));
}

self.onmessage = ({ data: { id, text } }) => {
  let made;
  try {
    made = blocks(text);
  } catch {
    made = [plain(text)]; // a parser that ran out of stack
  }
  self.postMessage({ id, blocks: made });
};
self.postMessage({ ready: true });
