import { readFileSync } from "node:fs"
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

export default defineConfig({
  base: "./", // works from any folder of a plain host
  plugins: [react(), wat()],
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
