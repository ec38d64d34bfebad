// Shows a text that grows, as Markdown. Model output is hostile until shown otherwise:
//   1. a worker turns it into HTML (`text/worker.js`), and is ended where that takes too long: the text is then shown
//      as it is, and the page goes on;
//   2. DOMPurify keeps what is on our list of it;
//   3. the content security policy of the page lets nothing run or load that is left.
import DOMPurify from "dompurify";
import { copyText, fill, h, icon } from "../dom.js";
import { t } from "../i18n.js";

const MAX_PAUSE = 2000; // milliseconds between two pictures of a text that grows
const DEADLINE = 1500; // milliseconds that the worker may take for one text
const CLASSES = /^(hl-(comment|string|number|keyword)|lang-[\w+#.-]*|math|math-source|plain)$/;

const TARGETS = /^(?:https?|mailto):/i; // where links may go

/** The worker, begun when it is needed, and again after it had to be ended. One text at a time. */
class Parser {
  constructor() {
    this.worker = null;
    this.jobs = []; // [id, text, resolve]: the first one is being worked on
    this.numJobs = 0;
  }

  /** Its blocks of HTML, or null if they take too long to make. */
  parse(text) {
    return new Promise((resolve) => {
      this.jobs.push([++this.numJobs, text, resolve]);
      if (this.jobs.length === 1) this.next();
    });
  }

  next() {
    if (!this.worker) {
      this.worker = new Worker("/page/worker.js");
      this.isReady = false;
      this.worker.onmessage = ({ data }) => (data.ready ? this.ready() : this.done(data.blocks));
      this.worker.onerror = () => this.giveUp();
    } else if (this.isReady) this.post();
  }

  ready() {
    this.isReady = true;
    this.post();
  }

  post() {
    const [id, text] = this.jobs[0];
    this.timer = setTimeout(() => this.giveUp(), DEADLINE);
    this.worker.postMessage({ id, text });
  }

  giveUp() {
    this.worker.terminate();
    this.worker = null;
    this.done(null);
  }

  done(blocks) {
    clearTimeout(this.timer);
    const [, , resolve] = this.jobs.shift();
    resolve(blocks);
    if (this.jobs.length) this.next();
  }
}

const parser = new Parser();
const purifier = DOMPurify();
purifier.addHook("uponSanitizeAttribute", (node, data) => {
  if (data.attrName === "class") data.keepAttr = CLASSES.test(data.attrValue);
  else if (data.attrName === "href") data.keepAttr = node.nodeName === "A" && TARGETS.test(data.attrValue);
});
purifier.addHook("afterSanitizeAttributes", (node) => {
  if (node.nodeName !== "A") return;
  node.setAttribute("target", "_blank");
  node.setAttribute("rel", "noopener noreferrer nofollow");
});
const ALLOWED = {
  USE_PROFILES: { html: true, mathMl: true },
  FORBID_TAGS: ["style", "form", "input", "button", "textarea", "select", "img", "picture", "video", "audio", "source"],
  FORBID_ATTR: ["style", "id", "name", "src", "srcset", "xlink:href", "background", "action", "tabindex"],
  ALLOW_DATA_ATTR: false,
  RETURN_DOM_FRAGMENT: true,
};

/** A block as an element, with a head over each piece of code: its language, and a button that copies it. */
function element(html) {
  const block = h("div", { class: "block" }, purifier.sanitize(html, ALLOWED));
  for (const pre of block.querySelectorAll("pre")) {
    pre.tabIndex = 0; // so that keys can scroll it
    const code = pre.querySelector("code");
    if (!code) continue;
    const copy = h("button", { type: "button", class: "copy-code", "aria-label": t("copy"),
      onclick: () => copyText(code.textContent, copy) });
    fill(copy, icon("copy"), t("copy"));
    const name = /lang-(\S+)/.exec(code.className)?.[1] ?? "";
    const frame = h("div", { class: "code" }, h("div", { class: "code-head" }, h("span", { text: name }), copy));
    pre.replaceWith(frame);
    frame.append(pre);
  }
  for (const table of block.querySelectorAll("table")) {
    const frame = h("div", { class: "table", tabindex: "0" });
    table.replaceWith(frame);
    frame.append(table);
  }
  return block;
}

export class MarkdownView {
  /**
   * @param {HTMLElement} root  what it fills
   * @param {() => void} settled  is told when the newest text stands there
   */
  constructor(root, settled) {
    this.root = root;
    this.settled = settled;
    this.shown = []; // HTML of the blocks that stand there
    this.text = this.done = ""; // what is to be shown, and what is
    this.drawing = null; // a promise of that all of it stands there
    this.goOn = () => {}; // ends a pause
  }

  get isSettled() {
    return this.text === this.done;
  }

  /**
   * Show this text: at once if the parser is free, otherwise as soon as it is, and then the newest one only.
   * isLast: no more of it will come, so it waits for nothing else. Returns a promise of that it stands there.
   */
  set(text, isLast) {
    Object.assign(this, { text, isLast });
    if (isLast) this.goOn();
    if (!this.isSettled) this.drawing ??= this.draw();
    return this.drawing;
  }

  async draw() {
    while (this.text !== this.done) {
      const asked = this.text;
      const begin = performance.now();
      this.show((await parser.parse(asked)) ?? asked);
      this.done = asked;
      if (this.isSettled) this.settled();
      if (this.isLast) continue;
      // A long text is shown less often, so that the page has time for everything else.
      const pause = Math.min(MAX_PAUSE, Math.max(30, 3 * (performance.now() - begin)));
      await new Promise((resume) => {
        this.goOn = resume;
        setTimeout(resume, pause);
      });
    }
    this.drawing = null;
  }

  /** @param {string[] | string} blocks  of HTML, or a text that is shown as it is */
  show(blocks) {
    if (typeof blocks === "string") {
      fill(this.root, h("pre", { class: "plain", tabindex: "0", text: blocks }));
      this.shown = [];
      return;
    }
    if (this.shown.length === 0) this.root.replaceChildren();
    let same = 0;
    while (same < blocks.length && blocks[same] === this.shown[same]) same++;
    while (this.root.children.length > same) this.root.lastChild.remove();
    this.root.append(...blocks.slice(same).map(element));
    this.shown = blocks;
  }
}
