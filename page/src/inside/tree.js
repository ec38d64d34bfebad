// (c) The radix tree: prefixes whose pages are cached. What stands left of several boxes is shared by them.
import { fill, h } from "../dom.js";
import { num, t } from "../i18n.js";

const MAX_CHILDREN = 12; // of a node that are shown
const MAX_DEPTH = 12;

export class Tree {
  constructor() {
    this.view = h("div", { class: "tree", tabindex: "0", role: "group", "aria-label": t("tree.title") });
    this.about = h("p", { class: "small muted" });
    this.root = h("div", {}, this.view, this.about);
    this.numEvicted = 0;
  }

  update({ tree }) {
    if (tree === this.shown) return;
    this.shown = tree;
    const children = Map.groupBy ? Map.groupBy(tree.nodes, (node) => node.parent) : grouped(tree.nodes);
    const branch = (parent, depth) => {
      const all = children.get(parent) ?? [];
      if (!all.length || depth > MAX_DEPTH) return null;
      const shown = all.slice(0,
        MAX_CHILDREN).map((node) => h("div", { class: "branch" }, box(node), branch(node.id, depth + 1)));
      const rest = all.length - shown.length;
      return h("div", { class: "children" }, shown,
        rest > 0 && h("div", { class: "small muted", text: t("tree.more", { n: num(rest) }) }));
    };
    this.numEvicted += tree.evicted.length;
    const tokens = tree.nodes.reduce((sum, node) => sum + node.num_tokens, 0);
    const values = { nodes: num(tree.nodes.length), tokens: num(tokens), evicted: num(this.numEvicted) };
    this.about.textContent = t("tree.about", values) + (tree.truncated ? ` ${t("tree.truncated")}` : "");
    fill(this.view, h("div", { class: "node root", text: t("tree.root") }), branch(-1, 0));
    Object.assign(this.root.dataset, { nodes: tree.nodes.length, tokens, evicted: this.numEvicted });
    this.root.dataset.hits = Number(this.root.dataset.hits ?? 0) + tree.nodes.filter((node) => node.hit).length;
  }
}

function grouped(nodes) {
  const groups = new Map();
  for (const node of nodes) groups.set(node.parent, [...(groups.get(node.parent) ?? []), node]);
  return groups;
}

function box(node) {
  const name = `node${node.refs ? " used" : ""}${node.hit ? " hit" : ""}`;
  return h(
    "div",
    { class: name, title: t("tree.node", { id: node.id, pages: num(node.num_pages) }), "data-refs": node.refs },
    h("span", { text: t("tree.tokens", { n: num(node.num_tokens) }) }),
    node.refs > 0 && h("b", { text: t("tree.refs", { n: num(node.refs) }) }),
  );
}
