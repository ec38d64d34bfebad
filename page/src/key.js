// The dialog that asks for an API key.
import { fill, h } from "./dom.js";
import { t } from "./i18n.js";

let asking = null; // a promise, while the dialog is open: whoever needs a key waits for the same one

/**
 * @param {string} why  the server's words
 * @param {boolean} isWrong  whether the server has refused one already
 * @returns {Promise<string>}  the key, or "" if the person gives none
 */
export function askKey(why, isWrong) {
  asking ??= new Promise((resolve) => {
    const input = h("input", { type: "password", name: "key", autocomplete: "off", required: true, id: "key-input" });
    const form = h(
      "form",
      { method: "dialog", onsubmit: () => dialog.close(input.value.trim()) },
      h("h2", { text: t("key.title"), id: "key-title" }),
      h("p", { text: isWrong ? t("key.wrong") : t("key.about") }),
      h("p", { class: "muted small", text: why }),
      h("label", { for: "key-input", text: t("key.label") }),
      input,
      h(
        "div",
        { class: "row end" },
        h("button", { type: "button", class: "button", onclick: () => dialog.close(""), text: t("cancel") }),
        h("button", { type: "submit", class: "button primary", text: t("key.use") }),
      ),
    );
    const dialog = h("dialog", { class: "dialog", "aria-labelledby": "key-title" });
    dialog.addEventListener("close", () => {
      asking = null;
      dialog.remove();
      resolve(dialog.returnValue);
    });
    document.body.append(fill(dialog, form));
    dialog.showModal();
    input.focus();
  });
  return asking;
}
