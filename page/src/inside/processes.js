// (a) The processes as boxes, with what waits in each and what flows between them.
import { fill, h } from "../dom.js";
import { num, t } from "../i18n.js";

const MAX_DOTS = 24;
// From each process to the next: the message that carries a request on.
const FLOWS = { api: "TokenizeMsg", tokenizer: "UserMsg", scheduler: "StepPlan", engine: "StepResult",
  detokenizer: "UserReply" };

export class Processes {
  constructor() {
    this.boxes = new Map();
    const parts = Object.entries(FLOWS).flatMap(([name, message]) => {
      const queue = h("span", { class: "queue", text: "0" });
      const unit = h("span", { class: "small muted", text: t(`process.${name}.queue`) });
      const dots = h("span", { class: "dots", "aria-hidden": "true" });
      const box = h(
        "li",
        { class: "process", "data-process": name, "data-queue": "0" },
        h("strong", { text: t(`process.${name}`) }),
        h("span", { class: "small muted", text: t(`process.${name}.about`) }),
        h("span", { class: "waits" }, queue, " ", unit),
        dots,
      );
      const arrow = h("li", { class: "flow", "aria-hidden": "true" }, h("span", { class: "mono", text: message }),
        h("i"));
      this.boxes.set(name, { box, queue, unit, dots, arrow });
      return [box, arrow];
    });
    this.root = h("div", { class: "scroll-x", tabindex: "0", role: "group", "aria-label": t("panel.processes") },
      h("ol", { class: "processes" }, parts));
  }

  update({ state, known }) {
    const isBusy = known.size > 0;
    for (const [name, queue] of Object.entries(state?.queues ?? {})) {
      const shown = this.boxes.get(name);
      shown.box.dataset.queue = queue;
      shown.queue.textContent = num(queue);
      shown.unit.textContent = t(`process.${name}.queue`, { n: queue });
      const count = Math.min(MAX_DOTS, queue);
      if (shown.dots.children.length !== count) fill(shown.dots, Array.from({ length: count }, () => h("i")));
      shown.arrow.classList.toggle("busy", isBusy);
    }
  }
}
