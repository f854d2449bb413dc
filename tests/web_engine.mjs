// One question to the browser's engine, in Node: JSON in, JSON out (see test_web_engine.py).
// node web_engine.mjs FOLDER-OF-ENGINE.JS MODEL-FOLDER < question
import { readFileSync } from "node:fs"
import { pathToFileURL } from "node:url"

const [, , code, folder] = process.argv
const engine = await import(pathToFileURL(`${code}/engine.js`))
const ask = JSON.parse(readFileSync(0, "utf8"))
const json = name => JSON.parse(readFileSync(`${folder}/${name}`, "utf8"))
const file = path => {
  const bytes = readFileSync(path)
  return bytes.buffer.slice(bytes.byteOffset, bytes.byteOffset + bytes.byteLength)
}
const model = (fast = true) =>
  new engine.GPT2(json("config.json"), file(ask.weights ?? `${folder}/model.safetensors`), fast)
const read = (m, ids, cache) => { // a prompt of any length
  let logits
  for (let at = 0; at < ids.length; at += engine.CHUNK) logits = m.forward(ids.slice(at, at + engine.CHUNK), cache)
  return logits
}
const tokenizer = () => new engine.Tokenizer(json("tokenizer.json"))

const jobs = {
  ids: () => { const t = tokenizer(); return ask.texts.map(text => t.encode(text)) },
  prompts: () => {
    const t = tokenizer()
    return ask.chats.map(messages => engine.prompt(t, messages, ask.room)).map(p => [p.ids, p.forgotten])
  },
  logits: () => { // of the last token: all read at once; short ones also one by one; in plain loops
    const fast = model(), plain = ask.plain ? model(false) : null
    return ask.prompts.map(ids => {
      const last = (m, parts) => {
        const cache = new engine.KVCache(m.config)
        let logits
        for (const part of parts) logits = read(m, part, cache)
        return Array.from(logits)
      }
      return [last(fast, [ids]), ids.length < 30 ? last(fast, ids.map(id => [id])) : null, plain && last(plain, [ids])]
    })
  },
  trace: () => {
    const m = model(), cache = new engine.KVCache(m.config), trace = { attention: [], logits: [] }
    const [last] = ask.ids.slice(-1)
    read(m, ask.ids.slice(0, -1), cache)
    m.forward([last], cache, trace)
    return { attention: trace.attention.map(heads => heads.map(w => Array.from(w))),
      logits: trace.logits.map(row => Array.from(row)) }
  },
  candidates: () => ask.cases.map(({ logits, said, sampling }) => {
    const found = engine.candidates(Float32Array.from(logits), said, sampling)
    return [found.ids, found.probabilities]
  }),
  pick: () => ask.us.map(u => engine.pick(ask.ids, ask.probabilities, u)),
  answer: () => {
    const m = model(), t = tokenizer(), cache = new engine.KVCache(m.config), read = []
    return ask.chats.map(messages => {
      const { ids } = engine.prompt(t, messages, ask.room)
      const drawn = []
      let steps = 0
      for (const token of engine.answer(m, t, cache, read, ids, ask.sampling, ask.limit, engine.random(ask.seed), 3))
        token ? drawn.push(token) : steps++
      return { ids: drawn.map(top => top[0][0]), top: drawn, chunks: steps }
    })
  },
  open: () => model().matmul === engine.plainMatmul ? "plain" : "fast",
}
let result
try {
  result = jobs[ask.job]()
} catch (error) {
  if (!error.code) throw error
  result = { error: error.code, detail: error.detail }
}
process.stdout.write(JSON.stringify(result))
