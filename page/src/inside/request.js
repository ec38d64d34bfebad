// One request: its eight stages with times, what happened between them, and the lines of code that did it.
import { askJson } from "../api.js";
import { fill, h, iconButton } from "../dom.js";
import { duration, num, t, tOr } from "../i18n.js";
import { highlight } from "../text/highlight.js";

const AGAIN = 500; // milliseconds between two looks at a request that has not ended
const NUM_STAGES = 8; // what comes behind them repeats, and has code of its own
const BETWEEN = ["prefill", "decode", "accepted", "retracted"];

let stages = null; // what /trace/stages says, asked once

export class RequestDetail {
  /** @param {() => void} close */
  constructor(close) {
    this.close = close;
    this.root = h("section", { class: "card request", hidden: true, "aria-label": t("request.title") });
    this.id = "";
    this.code = h("div", { class: "source" });
  }

  /** Show the request of this id, and follow it until it has ended; "": none. uid: only that one of its outputs. */
  async show(id, uid = "") {
    if (id === this.id && uid === this.uid) return;
    this.id = id;
    this.uid = uid;
    clearTimeout(this.timer);
    this.root.hidden = !id;
    fill(this.code);
    this.shown = "";
    if (id) await this.follow(id);
  }

  async follow(id) {
    let trace = null;
    try {
      stages ??= await askJson("/trace/stages");
      trace = await askJson(`/trace/${encodeURIComponent(id)}`);
    } catch (error) {
      if (id === this.id) fill(this.root, this.head(id), h("p", { class: "error", text: error.message }));
      return;
    }
    if (id !== this.id) return;
    trace.outputs = trace.outputs.filter((output) => !this.uid || String(output.uid) === this.uid);
    const json = JSON.stringify(trace);
    if (json !== this.shown) this.draw(trace);
    this.shown = json;
    const isDone = trace.outputs.every((output) => stagesOf(output).at(-1).time || output.reason === "abort");
    if (!isDone) this.timer = setTimeout(() => this.follow(id), AGAIN);
  }

  head(id) {
    const title = h("h2", {}, t("request.title"), " ", h("code", { class: "small muted", text: id }));
    return h("div", { class: "row" }, title, iconButton("close", t("close"), this.close));
  }

  draw(trace) {
    const focused = this.root.contains(document.activeElement) ? document.activeElement.dataset.stage : undefined;
    fill(this.root, this.head(trace.id), trace.outputs.map((output) => this.output(output)), this.code);
    if (focused) this.root.querySelector(`[data-stage="${CSS.escape(focused)}"]`)?.focus();
  }

  output(output) {
    const reached = stagesOf(output);
    const first = reached[0].time;
    const end = Math.max(...reached.map((stage) => stage.seconds ?? 0), 1e-6);
    const facts = t("request.facts",
      { prompt: num(output.num_prompt), cached: num(output.num_cached), output: num(output.num_output) });
    const list = reached.map((stage, index) => this.stage(stage, index, reached, end));
    const code = BETWEEN.map((name) => h("button", { type: "button", class: "text-button small", "data-stage": name,
      onclick: () => this.showCode(name), text: t(`stage.${name}`) }));
    const events = output.events.filter(({ name }) => name === "admitted" || BETWEEN.includes(name));
    const numDecodes = events.filter(({ name }) => name === "decode").length;
    return h(
      "div",
      { class: "output", "data-uid": output.uid },
      h("p", { class: "small muted", text: facts }),
      h("ol", { class: "stages" }, list),
      timeline(events, first, end),
      h("p", { class: "small muted" }, t("request.code"), code),
      h("p", { class: "small muted", text: t("request.events", { chunks: num(output.num_chunks),
        decodes: num(numDecodes), retractions: num(output.num_retractions) }) }),
      output.num_drafted > 0 && h("p", { class: "small muted", text: t("request.drafts",
        { right: num(output.num_accepted), drafted: num(output.num_drafted) }) }),
    );
  }

  stage(stage, index, reached, end) {
    const told = stages.stages.find(({ name }) => name === stage.name);
    const isDone = Boolean(stage.time);
    const notes = notesOf(stage, reached);
    const button = h(
      "button",
      { type: "button", class: "stage-name", "data-stage": stage.name, onclick: () => this.showCode(stage.name),
        title: told?.about ?? "" },
      h("b", { text: `${index + 1} ${tOr(`stage.${stage.name}`, stage.name)}` }),
      h("span", { class: "small muted", text: t(`process.${told?.process ?? "api"}`) }),
    );
    return h(
      "li",
      { class: `stage${isDone ? " done" : ""}`, "data-stage-done": isDone },
      button,
      h("span", { class: "when", text: isDone ? `+${duration(stage.seconds)}` : "–" }),
      h("span", { class: "track" }, isDone && h("i", { style: { left: `${(100 * stage.seconds) / end}%` } })),
      notes.length > 0 && h("span", { class: "small muted notes", text: notes.join(" · ") }),
    );
  }

  showCode(wanted) {
    const stage = stages.stages.find(({ name }) => name === wanted);
    if (!stage) return;
    const version = t("code.version", { version: stages.version });
    const pieces = stage.code.map((piece) => {
      const code = h("code");
      code.append(...highlighted(piece.text.trimEnd()));
      const lines = piece.text.trimEnd().split("\n").map((_, index) => piece.first + index).join("\n");
      return h(
        "div",
        { class: "code" },
        h("div", { class: "code-head" }, h("span", { class: "mono",
          text: `minisgl/${piece.file}:${piece.first}–${piece.last}` }), h("span", { text: piece.name })),
        h("pre", { tabindex: "0" }, h("span", { class: "lines", "aria-hidden": "true", text: lines }), code),
      );
    });
    const name = tOr(`stage.${stage.name}`, stage.name);
    fill(this.code, h("h3", {}, name, " ", h("span", { class: "small muted", text: version })),
      h("p", { class: "small", text: stage.about }), pieces);
    this.code.scrollIntoView({ block: "nearest" });
  }
}

/** The eight stages of an output, in their order; who was refused has not finished. */
function stagesOf({ events }) {
  const refused = events.find(({ name }) => name === "refused");
  return stages.stages.slice(0, NUM_STAGES).map(({ name }) => events.find((event) => event.name === name)
    ?? (name === "finished" && refused ? refused : { name }));
}

/** What is to be said of a stage beside its time. */
function notesOf(stage, reached) {
  const notes = [];
  if (stage.name === "tokenized" && stage.time) notes.push(t("note.tokens", { n: num(stage.num_tokens) }));
  if (stage.name === "queued" && stage.time) {
    const waited = (reached.find(({ name }) => name === "admitted").time ?? stage.time) - stage.time;
    if (stage.why) notes.push(t("note.waited", { time: duration(waited), why: tOr(`why.${stage.why}`, stage.why) }));
    else notes.push(t("note.straight"));
    if (stage.ahead) notes.push(t("note.ahead", { n: num(stage.ahead) }));
    if (stage.overtaken) notes.push(t("note.overtaken", { n: num(stage.overtaken) }));
  }
  if (stage.name === "admitted" && stage.time) notes.push(t("note.admitted",
    { row: stage.row, step: num(stage.step), n: num(stage.start) }));
  if (stage.reason) notes.push(tOr(`finish.${stage.reason}`, stage.reason));
  if (stage.status) notes.push([stage.status, stage.code, stage.param].filter(Boolean).join(" "));
  if (stage.first) notes.push(t("note.first"));
  return notes;
}

/** What repeats, on one line: chunks of the prompt, decode steps (every few), runs of guesses, retractions. */
function timeline(events, first, end) {
  const marks = events.map((event) => {
    const { name, num_new: numNew, start } = event;
    const text = t(`event.${name}`, { n: num((["prefill", "accepted"].includes(name) ? numNew : start) ?? 0) });
    const title = `+${duration(event.time - first)} ${text}`;
    const style = { left: `${Math.min(100, (100 * (event.time - first)) / end)}%` };
    if (name === "accepted") style.width = `${2 + numNew}px`; // a run is as long as it is
    return h("i", { class: name, title, style });
  });
  return h("div", { class: "timeline", role: "img", "aria-label": t("request.timeline", { n: num(events.length) }) },
    marks);
}

/** Code of ours as nodes: the highlighter's HTML, which escapes all that it did not write. */
function highlighted(text) {
  const document = new DOMParser().parseFromString(`<pre>${highlight(text, "python")}</pre>`, "text/html");
  return [...document.querySelector("pre").childNodes];
}
