import { readFileSync, writeFileSync } from "node:fs"
import react from "@vitejs/plugin-react"
import { defineConfig, type Plugin } from "vite"
import wabt from "wabt"

/** `import code from "./x.wat"`: the assembled WebAssembly, as base64. */
function wat(): Plugin {
  return {
    name: "wat",
    async load(id) {
      if (!id.endsWith(".wat")) return null
      const module = (await wabt()).parseWat(id, readFileSync(id, "utf8"), { simd: true })
      const { buffer } = module.toBinary({})
      return `export default "${Buffer.from(buffer).toString("base64")}"`
    },
  }
}

/** licenses.md with each licence once: below the packages that come under it, and whose they are. */
function shortLicenses(file: string): Plugin {
  return {
    name: "short-licenses",
    writeBundle() {
      const [head, ...sections] = readFileSync(file, "utf8").split("\n## ")
      const groups = new Map<string, string[]>()
      for (const section of sections) {
        const [name, ...lines] = section.trim().split("\n")
        const mine = lines.filter(line => /^copyright (\(c\)|\d)/i.test(line.trim())).map(line => line.trim())
        const rest = lines.filter(line => !/^copyright (\(c\)|\d)/i.test(line.trim()))
        const words = rest.join(" ").replace(/\(?(The )?MIT License( \(MIT\)|\))?/, "").replace(/\s+/g, " ").trim()
        const key = words.replace(/[\x60'"]+/g, '"')
        groups.set(key, [...groups.get(key) ?? [], `- ${[name, ...mine].join(", ")}`])
      }
      writeFileSync(file, [head.trim(), ...[...groups].flatMap(([words, names]) =>
        [names.sort().join("\n"), words])].join("\n\n") + "\n")
    },
  }
}

export default defineConfig({
  base: "./", // works from any folder of a plain host
  plugins: [react(), wat(), shortLicenses("../minigpt/assets/web/licenses.md")],
  build: {
    outDir: "../minigpt/assets/web",
    emptyOutDir: true,
    modulePreload: { polyfill: false },
    license: { fileName: "licenses.md" },
    rollupOptions: {
      input: { index: "index.html", engine: "src/engine.ts", worker: "src/worker.ts" },
      preserveEntrySignatures: "allow-extension",
      output: {
        entryFileNames: "[name].js",
        chunkFileNames: "[name].js",
        assetFileNames: "[name][extname]",
      },
    },
  },
})
