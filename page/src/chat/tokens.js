// The token view: each token of an answer, coloured by its probability, with what might have stood there instead.
import { fill, h } from "../dom.js";
import { num, t } from "../i18n.js";

const MAX_SHOWN = 4000; // tokens; more would make the page slow
const percent = (logprob) => `${num(100 * Math.exp(logprob), 1)} %`;

/** Of a probability, one of five classes: the palest is certain. */
export function grade(logprob) {
  const probability = Math.exp(logprob);
  return [0.9, 0.6, 0.3, 0.1].findIndex((bound) => probability >= bound) + 1 || 5;
}

/** Blanks and line ends of a token, made visible. */
export const visible = (text) => text.replaceAll(" ", "·").replaceAll("\n", "⏎").replaceAll("\t", "⇥") || "∅";

function alternatives(token, index) {
  const rows = token.top.some((one) => one.text === token.text) ? token.top : [token, ...token.top];
  return [
    h("p", { class: "small" }, t("tokens.chosen", { n: index + 1 }), " ", h("code", { text: visible(token.text) })),
    h(
      "table",
      {},
      h("thead", {}, h("tr", {}, h("th", { scope: "col", text: t("tokens.token") }),
        h("th", { scope: "col", text: t("tokens.probability") }))),
      h(
        "tbody",
        {},
        rows.map((one) =>
          h(
            "tr",
            one.text === token.text ? { class: "chosen" } : {},
            h("td", {}, h("code", { text: visible(one.text) })),
            h("td", {}, h("span", { class: "bar", style: { width: `${Math.max(1, 60 * Math.exp(one.logprob))}%` } }),
              ` ${percent(one.logprob)}`),
          ),
        ),
      ),
    ),
  ];
}

/** @param {import("./store.js").Token[]} tokens */
export function tokenView(tokens) {
  const detail = h("div", { class: "token-detail", "aria-live": "polite" },
    h("p", { class: "muted small", text: t("tokens.hint") }));
  const buttons = tokens.slice(0, MAX_SHOWN).map((token, index) =>
    h("button", {
      type: "button",
      class: `token grade-${grade(token.logprob)}`,
      text: token.text.replaceAll("\n", "⏎\n") || "∅",
      title: percent(token.logprob),
      tabindex: index === 0 ? "0" : "-1",
    }),
  );
  const choose = (index) => {
    for (const button of buttons) button.setAttribute("aria-pressed", "false");
    buttons[index].setAttribute("aria-pressed", "true");
    fill(detail, alternatives(tokens[index], index));
  };
  const list = h("div", { class: "tokens", role: "group", "aria-label": t("tokens.title") }, buttons);
  list.addEventListener("click", ({ target }) => buttons.includes(target) && choose(buttons.indexOf(target)));
  list.addEventListener("keydown", (event) => {
    const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    const index = buttons.indexOf(event.target) + (step ?? 0);
    if (!step || !buttons[index]) return;
    event.preventDefault();
    event.target.tabIndex = -1;
    buttons[index].tabIndex = 0;
    buttons[index].focus();
    choose(index);
  });
  const mean = tokens.reduce((sum, token) => sum + token.logprob, 0) / tokens.length;
  const about = t("tokens.about", { n: num(tokens.length), perplexity: num(Math.exp(-mean), 2) });
  return h("div", { class: "token-view" }, h("p", { class: "muted small", text: about }), list, detail);
}
