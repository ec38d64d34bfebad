// Light highlighting of code: comments, strings, numbers and keywords, by one regular expression for a family of
// languages. It knows no grammar.

export function escapeHtml(text) {
  return text.replace(/[&<>"']/g, (char) => `&#${char.charCodeAt(0)};`);
}

const MAX_CODE = 40_000; // characters
const STRING = String.raw`"(?:\\.|[^"\\\n])*"|'(?:\\.|[^'\\\n])*'`;
const HASH = String.raw`#[^\n]*`;
const SLASHES = String.raw`\/\/[^\n]*|\/\*[^]*?(?:\*\/|$)`;
const NUMBER = String.raw`\b(?:0x[\da-fA-F_]+|\d[\d_]*(?:\.\d+)?(?:[eE][+-]?\d+)?)\b`;

const words = (text) => String.raw`\b(?:${text.split(" ").join("|")})\b`;
const C_LIKE =
  "abstract async await auto bool boolean break case catch char class const continue default defer delete do double " +
  "else enum export extends false final float fn for func function go if impl implements import in inline instanceof " +
  "int interface let long match mod mut namespace new nil null nullptr override package private protected pub public " +
  "return self short signed sizeof static string struct super switch template this throw throws trait true try type " +
  "typedef typename typeof undefined union unsafe unsigned use using var virtual void volatile where while yield";
const PYTHON =
  "False None True and as assert async await break case class continue def del elif else except finally for from " +
  "global if import in is lambda match nonlocal not or pass raise return self try while with yield";
const SHELL = "case do done elif else esac export fi for function if in local return set then unset until while";
const SQL =
  "add all alter and as asc between by case create delete desc distinct drop else end exists from group having in " +
  "index inner insert into is join left like limit not null on or order outer primary right select set table then " +
  "union update values view when where with";

function family(comment, string, keywords, flags = "g") {
  return new RegExp(`(${comment})|(${string})|(${NUMBER})|(${words(keywords)})`, flags);
}

const FAMILIES = {
  c: family(SLASHES, `${STRING}|\`(?:\\\\.|[^\`\\\\])*\``, C_LIKE),
  python: family(HASH, `"""[^]*?(?:"""|$)|'''[^]*?(?:'''|$)|${STRING}`, PYTHON),
  shell: family(HASH, STRING, SHELL),
  sql: family(String.raw`--[^\n]*`, STRING, SQL, "gi"),
  data: family(HASH, STRING, "true false null yes no"),
};
const OF_LANGUAGE = {
  py: "python", python: "python", python3: "python", sh: "shell", bash: "shell", shell: "shell", zsh: "shell",
  console: "shell", sql: "sql", json: "data", yaml: "data", yml: "data", toml: "data", ini: "data",
  dockerfile: "shell", makefile: "shell", ruby: "python", rb: "python",
};
const OF_C =
  "c cc cpp c++ cuda cs csharp dart go h hpp java javascript " +
  "js jsx kotlin kt php rs rust scala swift ts tsx typescript zig";
for (const name of OF_C.split(" "))
  OF_LANGUAGE[name] = "c";
const CLASSES = ["", "hl-comment", "hl-string", "hl-number", "hl-keyword"];

/** HTML of code, escaped. */
export function highlight(code, language) {
  const pattern = FAMILIES[OF_LANGUAGE[language]];
  if (!pattern || code.length > MAX_CODE) return escapeHtml(code);
  let html = "";
  let end = 0;
  for (const match of code.matchAll(pattern)) {
    const kind = match.findIndex((group, index) => index > 0 && group !== undefined);
    html += `${escapeHtml(code.slice(end, match.index))}<span class="${CLASSES[kind]}">${escapeHtml(match[0])}</span>`;
    end = match.index + match[0].length;
  }
  return html + escapeHtml(code.slice(end));
}
