// Makes what the server sends of the sources in src/, into python/minisgl/page/assets/. Run: npm ci && npm run build
// The same sources and the same package-lock.json give the same bytes.
import { build } from "esbuild";
import { copyFile, mkdir, readFile, rename, rm, writeFile } from "node:fs/promises";
import { dirname, join } from "node:path";
import { fileURLToPath } from "node:url";

const HERE = dirname(fileURLToPath(import.meta.url));
const TARGET = process.argv[2] ?? join(HERE, "..", "python", "minisgl", "page", "assets");
const BUNDLED = ["dompurify", "marked", "temml"];
const SWAGGER = ["swagger-ui-bundle.js", "swagger-ui.css"];

const MADE = `${TARGET}.new`; // takes the target's place when all is made
await rm(MADE, { recursive: true, force: true });
await mkdir(MADE, { recursive: true });
await build({
  absWorkingDir: HERE,
  entryPoints: { app: "src/main.js", worker: "src/text/worker.js", style: "src/style/app.css", docs: "src/docs.js", "docs-style": "src/style/docs.css" },
  entryNames: "[name]",
  outdir: MADE,
  bundle: true,
  minify: true,
  charset: "utf8",
  target: ["chrome111", "firefox115", "safari16.4"],
  format: "iife",
  legalComments: "none", // licenses.txt has them whole
});
for (const name of ["index.html", "docs.html", "icon.svg"]) await copyFile(join(HERE, "src", name), join(MADE, name));
const modules = join(HERE, "node_modules");
for (const name of SWAGGER) await copyFile(join(modules, "swagger-ui-dist", name), join(MADE, name));

// Whoever passes on what others have written passes on their terms with it.
const licenses = [];
for (const name of [...BUNDLED, "swagger-ui-dist"]) {
  const { version, license } = JSON.parse(await readFile(join(modules, name, "package.json"), "utf8"));
  const text = await readFile(join(modules, name, "LICENSE"), "utf8");
  licenses.push(`${name} ${version} (${license})\n\n${text.replaceAll("\r\n", "\n").trim()}\n`);
}
await writeFile(join(MADE, "licenses.txt"), licenses.join(`\n${"-".repeat(80)}\n\n`));
await rm(TARGET, { recursive: true, force: true });
await rename(MADE, TARGET);
