// The page: its head, its two views, and what holds for both.
import { ChatView } from "./chat/view.js";
import { fill, h, iconButton } from "./dom.js";
import { LANGUAGES, currentLanguage, setLanguage, t } from "./i18n.js";
import { InsideView } from "./inside/view.js";

const THEME = "theme";
const dark = matchMedia("(prefers-color-scheme: dark)");

const isDark = () => (localStorage.getItem(THEME) ?? (dark.matches ? "dark" : "light")) === "dark";
const showTheme = () => (document.documentElement.dataset.theme = isDark() ? "dark" : "light");

function head() {
  const link = (name) => h("a", { href: `#${name}`, "data-view": name, text: t(`nav.${name}`) });
  const switchTheme = () => {
    localStorage.setItem(THEME, isDark() ? "light" : "dark");
    showTheme();
    showHead();
    header.querySelector(".theme").focus();
  };
  const switchLanguage = ({ target }) => {
    setLanguage(target.value);
    views.chat.build();
    views.inside.build();
    showHead();
    showView();
  };
  const language = h("select", { class: "language", "aria-label": t("language"), onchange: switchLanguage });
  fill(language, Object.entries(LANGUAGES).map(([value, text]) => h("option", { value, text, lang: value })));
  language.value = currentLanguage();
  return [
    h("a", { class: "brand", href: "#chat" },
      h("span", { class: "mark", "aria-hidden": "true" }, h("i"), h("i"), h("i")), "minisgl"),
    h("nav", { class: "views", "aria-label": t("nav") }, link("chat"), link("inside")),
    h("a", { class: "docs", href: "/docs", text: t("nav.docs") }),
    language,
    iconButton(isDark() ? "sun" : "moon", t(isDark() ? "theme.light" : "theme.dark"), switchTheme,
      { class: "icon-button theme" }),
  ];
}

const header = document.querySelector("header");
const main = document.querySelector("main");
const views = {
  chat: new ChatView({ inspect: (id) => (location.hash = `#inside/${id}`) }),
  inside: new InsideView(),
};

let shown = "chat"; // the view that the address names

function showHead() {
  fill(header, head());
  showCurrent();
}

function showCurrent() {
  for (const link of header.querySelectorAll("[data-view]"))
    link.setAttribute("aria-current", link.dataset.view === shown ? "page" : "false");
}

/** The view that the address names: `#chat`, `#inside`,
  or `#inside/` and the id of a request (and the uid of an output). */
function showView() {
  const [name, id, uid] = location.hash.slice(1).split("/");
  shown = name in views ? name : "chat";
  showCurrent();
  if (main.firstChild !== views[shown].root) fill(main, views[shown].root);
  views.inside.show(shown === "inside", id, uid);
  if (shown === "chat") views.chat.scrollToEnd();
}

addEventListener("hashchange", showView);
addEventListener("keydown", (event) => {
  if (event.key !== "Escape" || document.querySelector("dialog[open]")) return;
  if (views.chat.stop()) event.preventDefault();
  else views.chat.root.dataset.open = "";
});
dark.addEventListener("change", () => {
  showTheme();
  showHead();
});
setLanguage(currentLanguage());
showTheme();
showHead();
showView();
views.chat.start().catch((error) => console.warn(error.message));
