// The chat: conversations at the left, the one that is read in the middle, its settings at the right.
import { askJson } from "../api.js";
import { fill, h, icon, iconButton, saveFile } from "../dom.js";
import { t } from "../i18n.js";
import { newAnswer, writeAnswer } from "./answer.js";
import { AnswerView, UserView } from "./message.js";
import { defaultSettings, showSettings } from "./settings.js";
import { asMarkdown, deleteConversation, loadConversations, newConversation, saveConversation,
  titleOf } from "./store.js";

const SAVE_SECONDS = 1; // while an answer streams
const DEMO = "minisgl-demo"; // the built-in model
const REAL = "make serve MODEL=Qwen/Qwen3-0.6B";
const NEAR_END = 80; // pixels: whoever reads that close to the end is shown what comes

export class ChatView {
  /** @param {{inspect: (id: string) => void}} actions */
  constructor(actions) {
    this.actions = actions;
    this.conversations = [];
    this.models = [];
    this.current = newConversation(defaultSettings());
    this.running = new Map(); // by conversation: what ends its answer, and is told of what is new in it
    this.views = [];
    this.root = h("div", { class: "chat" });
    this.build();
  }

  async start() {
    const stored = await loadConversations();
    this.conversations.push(...stored);
    const last = stored.find(({ id }) => id === sessionStorage.getItem("conversation"));
    if (last) this.open(last);
    this.showList();
    const { data } = await askJson("/v1/models");
    this.models = data.map((model) => model.id);
    this.showSettings();
    this.showConversation();
  }

  /** Everything anew: at the beginning, and in another language. */
  build() {
    this.list = h("ul", { class: "conversations" });
    const begin = h("button", { type: "button", class: "button wide", onclick: () => this.begin() }, icon("plus"),
      t("chat.new"));
    this.sidebar = h("nav", { class: "sidebar", id: "sidebar", "aria-label": t("chat.list") }, begin, this.list);
    this.log = h("div", { class: "log" });
    this.scroller = h("div", { class: "scroller", tabindex: "0", role: "log", "aria-label": t("chat.log") }, this.log);
    this.input = h("textarea",
      { rows: 1, id: "prompt", "aria-label": t("chat.prompt"), placeholder: t("chat.prompt") });
    this.input.addEventListener("input", () => this.fitInput());
    this.input.addEventListener("keydown", (event) => {
      if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
      event.preventDefault();
      this.send();
    });
    this.button = h("button", { type: "submit", class: "send" });
    const submit = (event) => {
      event.preventDefault();
      if (this.running.has(this.current)) this.stop();
      else this.send();
    };
    this.composer = h("form", { class: "composer", onsubmit: submit }, this.input, this.button);
    this.title = h("span", { class: "title" });
    const bar = h(
      "div",
      { class: "chat-bar" },
      iconButton("menu", t("chat.list"), () => this.toggle("list"),
        { class: "icon-button narrow-only", "aria-controls": "sidebar" }),
      this.title,
      iconButton("sliders", t("settings"), () => this.toggle("settings"), { "aria-controls": "settings" }),
    );
    this.panel = h("div", { class: "panel-body" });
    this.settings = h(
      "aside",
      { class: "settings", id: "settings", "aria-label": t("settings") },
      h("div", { class: "row" }, h("h2", { text: t("settings") }),
        iconButton("close", t("close"), () => this.toggle("settings"))),
      this.panel,
    );
    const note = h("p", { class: "muted small note", text: t("chat.note") });
    const middle = h("section", { class: "conversation" }, bar, this.scroller,
      h("div", { class: "dock" }, this.composer, note));
    const shade = h("div", { class: "shade", onclick: () => this.toggle("") });
    fill(this.root, this.sidebar, middle, this.settings, shade);
    this.root.dataset.open = "";
    this.showList();
    this.showSettings();
    this.showConversation();
  }

  /** Open a drawer, or close the one that is open. */
  toggle(name) {
    this.root.dataset.open = this.root.dataset.open === name ? "" : name;
    if (name === "settings" && this.root.dataset.open) this.panel.querySelector("textarea")?.focus();
  }

  showSettings() {
    showSettings(this.panel, this.current.settings, this.models, () => this.save(this.current));
  }

  // -- Conversations ------------------------------------------------------------------------------------------------

  begin() {
    this.open(newConversation(defaultSettings()));
    this.input.focus();
  }

  open(conversation) {
    this.current = conversation;
    sessionStorage.setItem("conversation", conversation.id);
    this.root.dataset.open = "";
    this.showList();
    this.showSettings();
    this.showConversation();
  }

  /** Keep a conversation in the browser, once something has been said in it. */
  save(conversation) {
    if (conversation.messages.length) saveConversation(conversation);
  }

  remove(conversation) {
    if (!confirm(t("chat.delete.sure", { title: conversation.title }))) return;
    this.running.get(conversation)?.abort();
    this.conversations.splice(this.conversations.indexOf(conversation), 1);
    deleteConversation(conversation.id);
    if (conversation === this.current) this.begin();
    else this.showList();
  }

  rename(conversation, item) {
    const input = h("input", { value: conversation.title, "aria-label": t("chat.rename"), maxlength: 80 });
    const done = (isKept) => {
      if (isKept && input.value.trim()) conversation.title = input.value.trim();
      this.save(conversation);
      this.showList();
      this.title.textContent = this.current.title;
    };
    input.addEventListener("keydown", (event) => {
      if (event.key !== "Enter" && event.key !== "Escape") return;
      event.stopPropagation();
      input.onblur = null;
      done(event.key === "Enter");
    });
    input.onblur = () => done(true);
    fill(item, input);
    input.select();
  }

  showList() {
    const rows = this.conversations.map((conversation) => {
      const item = h("li", conversation === this.current ? { class: "current" } : {});
      const name = h("button",
        { type: "button", class: "name", onclick: () => this.open(conversation), text: conversation.title });
      if (conversation === this.current) name.setAttribute("aria-current", "true");
      const file = conversation.title.replace(/[^\p{L}\p{N}]+/gu, "-").slice(0, 40) || "chat";
      const json = () => saveFile(`${file}.json`, "application/json", JSON.stringify(conversation, null, 2));
      const markdown = () => saveFile(`${file}.md`, "text/markdown", asMarkdown(conversation));
      const menu = h(
        "details",
        { class: "menu" },
        h("summary", { "aria-label": t("chat.more", { title: conversation.title }), text: "⋯" }),
        h(
          "div",
          { class: "menu-items" },
          h("button", { type: "button", onclick: () => this.rename(conversation, item) }, icon("edit"),
            t("chat.rename")),
          h("button", { type: "button", onclick: markdown }, icon("save"), t("chat.export.markdown")),
          h("button", { type: "button", onclick: json }, icon("save"), t("chat.export.json")),
          h("button", { type: "button", onclick: () => this.remove(conversation) }, icon("trash"), t("chat.delete")),
        ),
      );
      menu.addEventListener("click", ({ target }) => target.closest("button") && (menu.open = false));
      menu.addEventListener("focusout", ({ relatedTarget }) => !menu.contains(relatedTarget) && (menu.open = false));
      fill(item, name, menu);
      return item;
    });
    fill(this.list, rows.length ? rows : h("li", { class: "muted small", text: t("chat.none") }));
  }

  // -- The conversation that is open --------------------------------------------------------------------------------

  showConversation() {
    const { messages, title } = this.current;
    this.title.textContent = title || t("chat.new");
    this.views = messages.map((message, index) => this.viewOf(message, index));
    const welcome = h(
      "div",
      { class: "welcome" },
      h("h1", { text: t("welcome.title") }),
      h("p", { class: "muted", text: t("welcome.about", { model: this.models[0] ?? "…" }) }),
      this.models[0] === DEMO
        && h("p", { class: "muted small" }, t("welcome.demo"), h("br"), h("code", { text: REAL })),
      h("div", { class: "suggestions" }, ["1", "2", "3"].map((n) => this.suggestion(t(`welcome.try.${n}`)))),
    );
    fill(this.log, messages.length ? this.views.map((view) => view.root) : welcome);
    this.showButton();
    this.scrollToEnd();
  }

  suggestion(text) {
    return h("button", { type: "button", class: "suggestion", onclick: () => this.say(text), text });
  }

  viewOf(message, index) {
    if (message.role === "user") return new UserView(message, { resend: (text) => this.resend(index, text) });
    const again = () => this.answer(index);
    return new AnswerView(message, { again, inspect: this.actions.inspect, results: () => this.answer(index + 1) });
  }

  showButton() {
    const isRunning = this.running.has(this.current);
    const label = t(isRunning ? "stop" : "send");
    fill(this.button, icon(isRunning ? "stop" : "send"));
    this.button.setAttribute("aria-label", label);
    this.button.title = isRunning ? `${label} (Esc)` : label;
  }

  fitInput() {
    this.input.style.height = "auto";
    this.input.style.height = `${Math.min(this.input.scrollHeight, 220)}px`;
  }

  send() {
    const text = this.input.value.trim();
    if (!text || this.running.has(this.current)) return;
    this.input.value = "";
    this.fitInput();
    this.say(text);
  }

  say(text) {
    const { current } = this;
    if (!current.messages.length) {
      current.title = titleOf(text);
      if (!this.conversations.includes(current)) this.conversations.unshift(current);
      sessionStorage.setItem("conversation", current.id);
    }
    current.messages.push({ role: "user", content: text });
    this.answer(current.messages.length);
    this.showList();
  }

  resend(index, text) {
    this.stop();
    this.current.messages.splice(index, Infinity, { role: "user", content: text });
    this.answer(index + 1);
  }

  /** Have the message of this index written, by the model; what stands there and behind it is gone. */
  async answer(index) {
    const conversation = this.current;
    this.running.get(conversation)?.abort();
    const message = newAnswer();
    conversation.messages.splice(index, Infinity, message);
    conversation.updated = Date.now();
    const controller = new AbortController();
    this.running.set(conversation, controller);
    this.showConversation();
    let saved = performance.now();
    await writeAnswer(conversation, controller.signal, () => {
      this.showProgress(message);
      if (performance.now() - saved < SAVE_SECONDS * 1000) return;
      saved = performance.now();
      this.save(conversation);
    });
    const isFollowed = this.isAtEnd();
    const view = this.views.find((one) => one.message === message);
    await view?.update();
    if (view && isFollowed) this.scrollToEnd();
    if (this.running.get(conversation) === controller) this.running.delete(conversation);
    this.save(conversation);
    this.showButton();
  }

  /** At most once in each frame, whatever comes. */
  showProgress(message) {
    if (this.frame) return;
    this.frame = requestAnimationFrame(() => {
      this.frame = 0;
      const view = this.views.at(-1);
      if (view?.message !== this.current.messages.at(-1)) return;
      const isFollowed = this.isAtEnd();
      view.update();
      if (isFollowed) requestAnimationFrame(() => this.scrollToEnd());
    });
  }

  isAtEnd() {
    const { scrollHeight, scrollTop, clientHeight } = this.scroller;
    return scrollHeight - scrollTop - clientHeight < NEAR_END;
  }

  scrollToEnd() {
    this.scroller.scrollTop = this.scroller.scrollHeight;
  }

  /** End the answer that is being written. Returns whether there was one. */
  stop() {
    const controller = this.running.get(this.current);
    controller?.abort();
    return Boolean(controller);
  }
}
