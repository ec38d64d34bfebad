// The buttons above the panels: loads to look at, and how fast the server works.
import { ask, askJson } from "../api.js";
import { fill, h, icon } from "../dom.js";
import { duration, num, t } from "../i18n.js";
import { LOADS, canRetract, limitsOf, numStreams, runLoad } from "./loads.js";

const RENEW = 20_000; // milliseconds: the server forgets a pace after 60 seconds
const DELAYS = [0, 50, 100, 200, 500, 1000, 2000]; // milliseconds

export class Controls {
  constructor() {
    this.live = null;
    this.server = null;
    this.modelLength = null;
    this.load = null; // what ends the one that runs
    this.pace = { delay_ms: 0, paused: false };
    this.root = h("div", { class: "controls" });
    this.told = h("p", { class: "small muted", role: "status" });
    this.buttons = Object.keys(LOADS).map((name) => h("button",
      { type: "button", class: "button", "data-load": name, onclick: () => this.run(name) }, t(`load.${name}`)));
    this.stop = h("button", { type: "button", class: "button", hidden: true, onclick: () => this.load?.abort() },
      icon("stop"), t("stop"));
    this.speed = h("div", { class: "pace" });
    const loads = h("div", { class: "loads", role: "group", "aria-label": t("load.title") },
      h("span", { class: "small muted", text: t("load.title") }), this.buttons, this.stop);
    fill(this.root, loads, this.told);
  }

  update(live) {
    this.live = live;
    if (live.server !== this.server && live.state) {
      this.server = live.server;
      this.showLimits();
      this.showPace();
    }
  }

  async showLimits() {
    this.modelLength ??= (await askJson("/v1/models")).data[0].max_model_len;
    this.limits = limitsOf(this.server, this.modelLength);
    const button = this.buttons.find((one) => one.dataset.load === "retracted");
    button.disabled = !canRetract(this.limits);
    button.title = button.disabled ? t("load.retracted.flag", { pool: num(this.limits.pool) }) : "";
    if (button.disabled && !this.told.textContent) this.told.textContent = button.title;
    this.root.dataset.ready = "true";
  }

  /** Run a load to its end. Its ids stand in `data-ids`, for whoever wants to look them up. */
  async run(name) {
    this.load?.abort();
    const controller = (this.load = new AbortController());
    const ids = [];
    this.root.dataset.state = "running";
    this.stop.hidden = false;
    this.told.textContent = name === "long" && this.limits.rows === 1 ? t("load.long.alone")
      : t(`load.${name}.about`, { n: numStreams(this.limits) });
    try {
      await runLoad(name, this.limits, controller.signal, (id) => {
        ids.push(id);
        this.root.dataset.ids = ids.join(" ");
      });
    } catch (error) {
      controller.abort();
      this.told.textContent = error.name === "AbortError" ? t("load.stopped") : t("failed", { why: error.message });
    }
    if (this.load !== controller) return;
    this.load = null;
    this.stop.hidden = true;
    this.root.dataset.state = controller.signal.aborted ? "stopped" : "done";
  }

  // -- Speed --------------------------------------------------------------------------------------------------------

  showPace() {
    clearInterval(this.renewing);
    this.pace = { delay_ms: 0, paused: false };
    if (!this.live.state.may_slow) {
      fill(this.speed, h("span", { class: "small muted", text: t("pace.off") }));
      return;
    }
    const pause = h("button", { type: "button", class: "button", "aria-pressed": "false",
      onclick: () => this.setPace({ paused: !this.pace.paused }) });
    const slow = h("input", { type: "range", min: 0, max: DELAYS.length - 1, value: 0, id: "pace-delay" });
    const shown = h("output", { for: "pace-delay", class: "small" });
    slow.addEventListener("input", () => this.setPace({ delay_ms: DELAYS[slow.value] }));
    this.paceShown = () => {
      pause.setAttribute("aria-pressed", String(this.pace.paused));
      fill(pause, icon(this.pace.paused ? "play" : "pause"), t(this.pace.paused ? "pace.resume" : "pace.pause"));
      shown.textContent = this.pace.delay_ms ? t("pace.delay", { time: duration(this.pace.delay_ms / 1000) })
        : t("pace.full");
    };
    this.paceShown();
    fill(this.speed, pause, h("label", { for: "pace-delay", class: "small", text: t("pace.slow") }), slow, shown);
    this.renewing = setInterval(() => (this.pace.paused || this.pace.delay_ms) && this.postPace(), RENEW);
  }

  setPace(change) {
    Object.assign(this.pace, change);
    this.paceShown();
    this.postPace();
  }

  async postPace() {
    try {
      await ask("/trace/pace", { body: this.pace, headers: this.live.headers });
    } catch (error) {
      this.told.textContent = t("failed", { why: error.message });
    }
  }
}
