// The live inspector: panels that draw what `live.js` receives.
import { fill, h } from "../dom.js";
import { num, t } from "../i18n.js";
import { Controls } from "./controls.js";
import { Live } from "./live.js";
import { Pool } from "./pool.js";
import { Processes } from "./processes.js";
import { RequestDetail } from "./request.js";
import { Replicas } from "./replicas.js";
import { Requests } from "./requests.js";
import { Sparks } from "./sparks.js";
import { Strip } from "./strip.js";
import { Tree } from "./tree.js";

export class InsideView {
  constructor() {
    this.root = h("div", { class: "inside", tabindex: "-1" });
    this.live = new Live(() => this.update());
    this.isShown = false;
    this.build();
    document.addEventListener("visibilitychange", () => this.watch());
    addEventListener("resize", () => this.update());
  }

  build() {
    this.status = h("p", { class: "small status", role: "status" });
    this.controls = new Controls();
    this.detail = new RequestDetail(() => (location.hash = "#inside"));
    this.requests = new Requests(({ id, uid }) => {
      const isOpen = id === this.detail.id && String(uid) === this.detail.uid;
      location.hash = isOpen ? "#inside" : `#inside/${encodeURIComponent(id)}/${uid}`;
    });
    this.panels = { replicas: new Replicas((name) => this.live.choose(name)), processes: new Processes(),
      sparks: new Sparks(), strip: new Strip(), requests: this.requests, tree: new Tree(), pool: new Pool() };
    const card = (name) =>
      h(
        "section",
        { class: `card ${name}-card`, "aria-labelledby": `card-${name}`, "data-panel": name },
        h("h2", { id: `card-${name}`, text: t(`panel.${name}`) }),
        h("p", { class: "small muted about", text: t(`panel.${name}.about`) }),
        this.panels[name].root,
      );
    const head = h("div", { class: "inside-head" }, h("h1", { text: t("inside.title") }), this.controls.speed,
      this.status);
    this.cluster = card("replicas");
    fill(this.root, head, this.controls.root, h("div", { class: "cards" }, this.cluster, card("processes"),
      card("sparks"), card("strip"), card("requests"), this.detail.root, card("tree"), card("pool")));
    this.update();
  }

  /**
   * @param {boolean} isShown  whether people see it
   * @param {string} [id]  of the request that is opened
   * @param {string} [uid]  of one of its outputs
   */
  show(isShown, id = "", uid = "") {
    this.isShown = isShown;
    this.watch();
    if (!isShown) return;
    this.requests.chosen = uid;
    this.detail.show(decodeURIComponent(id),
      uid).then(() => id && this.detail.root.scrollIntoView({ block: "nearest" }));
    this.update();
  }

  watch() {
    this.live.watch(this.isShown && !document.hidden);
  }

  update() {
    if (!this.isShown) return;
    const { live } = this;
    this.root.dataset.status = live.status;
    this.status.textContent = this.statusText();
    this.cluster.hidden = !live.cluster;
    this.controls.update(live);
    for (const panel of Object.values(this.panels)) panel.update(live);
  }

  statusText() {
    const { status, server } = this.live;
    if (status === "off" || status === "connecting") return t(`inside.${status}`);
    if (status !== "on") return t("inside.lost", { why: status });
    const values = { model: server.served_model_name, rows: num(server.max_running_requests),
      budget: num(server.max_prefill_length), pages: num(server.num_pages), size: server.page_size,
      policy: server.schedule_policy };
    return t("inside.on", values);
  }
}
