// System prompt, model and sampling parameters: what they are, the panel that changes them, and the body they make.
import { fill, h } from "../dom.js";
import { t } from "../i18n.js";

// Numbers that the API takes by these names: least, greatest, step, and what the server does where none is given.
const NUMBERS = {
  temperature: [0, 2, 0.1],
  top_p: [0, 1, 0.05],
  top_k: [1, 1000, 1],
  min_p: [0, 1, 0.05],
  max_tokens: [1, 1_000_000, 1],
  seed: [0, 2 ** 31, 1],
  repetition_penalty: [0.1, 2, 0.05],
  frequency_penalty: [-2, 2, 0.1],
  presence_penalty: [-2, 2, 0.1],
};
const TOP = 5; // alternatives to each token in the token view
const LAST = "settings"; // those of the last conversation are the next one's

export const defaultSettings = () => ({
  system: "", model: "", stop: "", tools: "", thinking: "", logprobs: true,
    ...JSON.parse(localStorage.getItem(LAST) ?? "{}"),
});

/**
 * The body of a request, but for its messages.
 * @throws {Error} where the tools are no JSON
 */
export function bodyOf(settings) {
  const body = { model: settings.model || undefined, stream: true, stream_options: { include_usage: true } };
  for (const name of Object.keys(NUMBERS)) if (typeof settings[name] === "number") body[name] = settings[name];
  const stop = settings.stop.split("\n").filter((line) => line);
  if (stop.length) body.stop = stop;
  if (settings.tools.trim()) {
    try {
      body.tools = JSON.parse(settings.tools);
    } catch (error) {
      throw new Error(t("settings.tools.bad", { why: error.message }));
    }
  }
  if (settings.thinking) body.enable_thinking = settings.thinking === "on";
  if (settings.logprobs) Object.assign(body, { logprobs: true, top_logprobs: TOP });
  return body;
}

/**
 * Fill a panel with the fields of a conversation's settings.
 * @param {HTMLElement} panel
 * @param {Object} settings  which it changes
 * @param {string[]} models  names of what the server has
 * @param {() => void} changed
 */
export function showSettings(panel, settings, models, changed) {
  const put = (name, value) => {
    settings[name] = value;
    localStorage.setItem(LAST, JSON.stringify({ ...settings, seed: undefined }));
    changed();
  };
  const field = (name, control, about = "") => {
    control.id = `set-${name}`;
    control.setAttribute("name", name);
    const note = about && h("p", { class: "muted small", id: `about-${name}`, text: about });
    if (about) control.setAttribute("aria-describedby", `about-${name}`);
    return h("div", { class: "field" }, h("label", { for: control.id, text: t(`settings.${name}`) }), control, note);
  };
  const area = (name, rows, props = {}) =>
    h("textarea", { rows, value: settings[name], oninput: ({ target }) => put(name, target.value), ...props });
  const select = (name, options) => {
    const given = Object.entries(options).map(([value, text]) => h("option", { value, text }));
    return h("select", { onchange: ({ target }) => put(name, target.value) }, given);
  };
  const number = (name) => {
    const [min, max, step] = NUMBERS[name];
    const read = ({ target }) =>
      put(name, target.value === "" ? null : Math.min(max, Math.max(min, Number(target.value))));
    const props = { type: "number", min, max, step, inputmode: "decimal", placeholder: t("settings.auto"),
      oninput: read };
    return field(name, h("input", { ...props, value: settings[name] ?? "" }));
  };
  const model = select("model", Object.fromEntries(models.map((name) => [name, name])));
  model.value = models.includes(settings.model) ? settings.model : models[0];
  const thinking = select("thinking", { "": t("settings.auto"), on: t("on"), off: t("off") });
  thinking.value = settings.thinking;
  const logprobs = h("input", { type: "checkbox", onchange: ({ target }) => put("logprobs", target.checked) });
  logprobs.checked = settings.logprobs;
  fill(
    panel,
    field("system", area("system", 4, { placeholder: t("settings.system.hint") })),
    models.length > 0 && field("model", model),
    h("div", { class: "fields" }, Object.keys(NUMBERS).map(number)),
    field("stop", area("stop", 2), t("settings.stop.about")),
    field("thinking", thinking),
    h("div", { class: "switch" }, field("logprobs", logprobs, t("settings.logprobs.about"))),
    field("tools", area("tools", 4, { class: "mono", placeholder: '[{"type": "function", "function": …}]' }),
      t("settings.tools.about")),
  );
}
