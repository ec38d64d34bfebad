// The live inspector.
import { fill, h } from "../dom.js";
import { t } from "../i18n.js";

export class InsideView {
  constructor() {
    this.root = h("div", { class: "inside" });
    this.build();
  }

  build() {
    fill(this.root, h("p", { class: "muted", text: t("inside.soon") }));
  }

  show() {}
}
