// How one message of a conversation looks, and what can be done with it.
import { copyText, fill, h, icon, iconButton } from "../dom.js";
import { duration, num, t, tOr } from "../i18n.js";
import { MarkdownView } from "../text/view.js";
import { tokenView } from "./tokens.js";

const MIN_DECODE = 0.1; // seconds between first and last token: less says nothing of the speed

/** What stands under an answer, in words. */
export function statsOf({ stats, state }) {
  const parts = [];
  if (stats.numOutput > 1 && stats.firstToken !== undefined) {
    const speed = stats.decodeSeconds >= MIN_DECODE ? (stats.numOutput - 1) / stats.decodeSeconds
      : stats.numOutput / (stats.firstToken + stats.decodeSeconds); // they came together
    parts.push(t("stats.speed", { n: num(speed, 1) }));
  }
  if (stats.firstToken !== undefined) parts.push(t("stats.ttft", { time: duration(stats.firstToken) }));
  if (stats.numOutput !== undefined) parts.push(t("stats.tokens", { n: num(stats.numOutput) }));
  if (stats.numPrompt !== undefined)
    parts.push(t("stats.cached", { n: num(stats.numCached), all: num(stats.numPrompt) }));
  if (state === "stopped") parts.push(t("stats.stopped"));
  else if (stats.finish) parts.push(tOr(`finish.${stats.finish}`, stats.finish));
  return parts;
}

export class UserView {
  /** @param {{resend: (text: string) => void}} actions */
  constructor(message, actions) {
    this.root = h("article", { class: "message user", "aria-label": t("you") });
    this.message = message;
    this.actions = actions;
    this.show();
  }

  show() {
    fill(
      this.root,
      h("div", { class: "bubble", text: this.message.content }),
      h("div", { class: "tools" }, iconButton("edit", t("edit"), () => this.edit())),
    );
  }

  edit() {
    const area = h("textarea",
      { rows: Math.min(12, this.message.content.split("\n").length + 1), value: this.message.content });
    area.setAttribute("aria-label", t("edit"));
    const send = () => area.value.trim() && this.actions.resend(area.value.trim());
    const cancel = () => {
      this.show();
      this.root.querySelector("button").focus();
    };
    area.addEventListener("keydown", (event) => {
      if (event.key === "Escape") {
        event.stopPropagation();
        cancel();
      } else if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
        event.preventDefault();
        send();
      }
    });
    fill(
      this.root,
      h(
        "div",
        { class: "edit" },
        area,
        h(
          "div",
          { class: "row end" },
          h("button", { type: "button", class: "button", onclick: cancel, text: t("cancel") }),
          h("button", { type: "button", class: "button primary", onclick: send, text: t("resend") }),
        ),
      ),
    );
    area.focus();
  }
}

export class AnswerView {
  /** @param {{again: () => void, inspect: (id: string) => void, results: () => void}} actions */
  constructor(message, actions) {
    this.message = message;
    this.actions = actions;
    const body = h("div", { class: "text" });
    this.markdown = new MarkdownView(body, () => this.showEnd());
    this.thought = h("div", { class: "text" });
    this.thinking = h("summary");
    this.reasoning = h("details", { class: "reasoning", hidden: true }, this.thinking, this.thought);
    this.calls = h("div", { class: "calls" });
    this.error = h("p", { class: "error", role: "alert", hidden: true });
    this.stats = h("p", { class: "stats muted small" });
    this.tools = h("div", { class: "tools" });
    this.tokens = h("div", { hidden: true });
    this.shownCalls = "";
    this.waiting = h("div", { class: "pending", role: "status", "aria-label": t("waiting") }, h("i"), h("i"), h("i"));
    const foot = h("div", { class: "foot" }, this.stats, this.tools);
    const parts = [this.waiting, this.reasoning, body, this.calls, this.error, this.tokens, foot];
    this.root = h("article", { class: "message answer", "aria-label": t("answer") }, parts);
    this.update();
  }

  /** Show what there is of it now. Returns a promise of that it is drawn. */
  update() {
    const { message } = this;
    const isStreaming = message.state === "streaming";
    this.root.dataset.state = message.state;
    this.waiting.hidden = !isStreaming || Boolean(message.content || message.reasoning || message.calls.length);
    const drawn = this.markdown.set(message.content, !isStreaming);
    this.showEnd();
    this.reasoning.hidden = !message.reasoning;
    if (message.reasoning) {
      this.thinking.textContent = isStreaming && !message.content ? t("reasoning.now") : t("reasoning.done");
      this.thought.textContent = message.reasoning; // plain: it is folded, and may be long
    }
    this.showCalls(isStreaming);
    this.error.hidden = !message.error;
    this.error.textContent = message.error ? t("failed", { why: message.error }) : "";
    return drawn;
  }

  /** Once it has ended and all of it is drawn: that it is no longer busy, for readers of screens, and what it took. */
  showEnd() {
    const isBusy = this.message.state === "streaming" || !this.markdown.isSettled;
    this.root.setAttribute("aria-busy", isBusy);
    if (isBusy) return;
    fill(this.stats, statsOf(this.message).map((part) => h("span", { text: part })));
    this.showTools();
  }

  showTools() {
    const { message, actions } = this;
    const copy = iconButton("copy", t("copy"), () => copyText(message.content, copy));
    const toggle = iconButton("tokens", t("tokens.title"), () => this.toggleTokens(toggle),
      { "aria-expanded": "false" });
    const { requestId } = message.stats;
    fill(
      this.tools,
      copy,
      iconButton("retry", t("again"), actions.again),
      message.tokens.length > 0 && toggle,
      requestId && h("button",
        { type: "button", class: "text-button small", onclick: () => actions.inspect(requestId), text: t("inspect") }),
    );
  }

  toggleTokens(button) {
    this.tokens.hidden = !this.tokens.hidden;
    button.setAttribute("aria-expanded", String(!this.tokens.hidden));
    if (!this.tokens.hidden) fill(this.tokens, tokenView(this.message.tokens));
  }

  /** The functions that the model calls, and where it is done, fields for what they returned. */
  showCalls(isStreaming) {
    const { calls } = this.message;
    const state = JSON.stringify([calls.map((call) => [call.name, call.arguments]), isStreaming]);
    if (state === this.shownCalls) return;
    this.shownCalls = state;
    const shown = calls.map((call) => {
      const result = h("textarea",
        { rows: 2, value: call.result ?? "", "aria-label": t("call.result", { name: call.name }) });
      result.placeholder = t("call.result", { name: call.name });
      result.addEventListener("input", () => (call.result = result.value));
      const head = h("div", { class: "code-head" }, h("span", {}, icon("play"), t("call", { name: call.name })));
      return h("div", { class: "code call" }, head, h("pre", { tabindex: "0", text: indented(call.arguments) }),
        !isStreaming && result);
    });
    const send = h("button", { type: "button", class: "button", onclick: this.actions.results, text: t("call.send") });
    fill(this.calls, shown, !isStreaming && calls.length > 0 && h("div", { class: "row end" }, send));
  }
}

function indented(json) {
  try {
    return JSON.stringify(JSON.parse(json), null, 2);
  } catch {
    return json; // half of it
  }
}
