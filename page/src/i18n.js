// The page's words, by key: in English, and in Chinese. A test says where one of them lacks.
import words from "./i18n.json";

export const LANGUAGES = { en: "English", zh: "中文" };

let language = localStorage.getItem("language") ?? (navigator.language.toLowerCase().startsWith("zh") ? "zh" : "en");
if (!(language in LANGUAGES)) language = "en";

export const currentLanguage = () => language;

export function setLanguage(name) {
  language = name;
  localStorage.setItem("language", name);
  document.documentElement.lang = name === "zh" ? "zh-CN" : "en";
}

/** The words of a key; `{name}` in them stands for a value, `{name:page|pages}` for the word that fits 1, or others. */
export function t(key, values = {}) {
  return words[key][language === "zh" ? 1 : 0].replace(/\{(\w+)(?::([^|}]*)\|([^}]*))?\}/g, (_, name, one, others) =>
    (one === undefined ? values[name] ?? "" : String(values[name]) === "1" ? one : others));
}

/** The words of a key that may be missing, of names that come from the server. */
export const tOr = (key, otherwise) => (key in words ? t(key) : otherwise);

/** A number as people of this language write it. */
export function num(value, digits = 0) {
  return value.toLocaleString(language, { maximumFractionDigits: digits, minimumFractionDigits: digits });
}

/** A duration: milliseconds below one second. */
export function duration(seconds) {
  if (seconds < 0.0095) return `${num(seconds * 1000, 1)} ms`;
  return seconds < 0.9995 ? `${num(seconds * 1000)} ms` : `${num(seconds, 2)} s`;
}
