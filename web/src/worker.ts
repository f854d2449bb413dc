// The engine in a thread of its own: loads the model, answers, and looks inside.
import { answer, CHUNK, EngineError, GPT2, KVCache, likeliest, plainMatmul, prompt, random, Tokenizer,
  type Config, type Message, type Sampling } from "./engine"
import { storage, type KeptFile } from "./storage"

export interface Question { messages: Message[], sampling: Sampling, limit: number, seed: number | null }
export interface Look { messages: Message[], limit: number, said: number[] }
export type ToWorker = { type: "load", base: string } | { type: "stop" }
  | ({ type: "answer" } & Question) | ({ type: "look" } & Look)
export interface Inside {
  tokens: string[] // what was read
  attention: number[][][] // [block][head][token]
  lens: [string, number][] // for each block: the likeliest token and its probability
}
export type WorkerToken = { id: number, text: string, logprob: number, top: [string, number][] }
export type FromWorker = { type: "progress", done: number, total: number | null } | { type: "opening" }
  | { type: "ready", name: string, context: number, fast: boolean, kept: boolean }
  | { type: "piece", text: string, token: WorkerToken }
  | { type: "done", finish: "stop" | "length" | "stopped", forgotten: number }
  | { type: "inside", inside: Inside } | { type: "error", code: string, detail: string }

const TOP = 5 // tokens that are shown beside the one that was said
let model: GPT2, tokenizer: Tokenizer, cache: KVCache
let read: number[] = [] // the ids in the cache
let stop = false

const tell = (message: FromWorker) => postMessage(message)
const nameOf = (id: number) => new TextDecoder().decode(tokenizer.bytes[id])

/** Lets messages in (such as "stop") between two tokens. */
const channel = new MessageChannel()
const breathe = () => new Promise(resolve => {
  channel.port1.onmessage = resolve
  channel.port2.postMessage(0)
})

// ------------------------------------------------------------------ loading
const NAMES = ["config.json", "tokenizer.json", "model.safetensors"]

/** What tells a newer file from a kept one; null if nobody answers. */
async function tagOf(url: string): Promise<string | null> {
  try {
    const { ok, status, headers } = await fetch(url, { method: "HEAD", cache: "no-cache" })
    if (!ok) throw new EngineError("no-model", `${url} (${status})`)
    return [headers.get("etag") ?? headers.get("last-modified"), headers.get("content-length")].join()
  } catch (error) {
    if (error instanceof EngineError) throw error
    return null
  }
}

async function download(url: string, progress: (done: number, total: number | null) => void): Promise<ArrayBuffer> {
  let response: Response
  try {
    response = await fetch(url)
  } catch { throw new EngineError("network") }
  if (!response.ok) throw new EngineError("no-model", `${url} (${response.status})`)
  const packed = response.headers.has("content-encoding") // then the length is another one
  const total = packed ? null : Number(response.headers.get("content-length")) || null
  const parts: Uint8Array<ArrayBuffer>[] = []
  let done = 0
  try {
    for (const reader = response.body!.getReader(); ;) {
      const { value } = await reader.read()
      if (!value) break
      parts.push(value)
      progress(done += value.length, total)
    }
  } catch { throw new EngineError("network") }
  return new Blob(parts).arrayBuffer()
}

async function fetchFile(url: string, fresh: boolean): Promise<KeptFile & { kept: boolean }> {
  const old = fresh ? undefined : await storage.file(url).catch(() => undefined)
  const tag = await tagOf(url)
  if (old && (tag === null || tag === old.tag)) return { ...old, kept: true }
  const progress = url.endsWith(".safetensors")
    ? (done: number, total: number | null) => tell({ type: "progress", done, total }) : () => {}
  return { url, tag: tag ?? "", data: await download(url, progress), kept: false }
}

function open(files: KeptFile[]): void {
  const [config, vocabulary] = files.slice(0, 2).map(({ data }) => {
    try {
      return JSON.parse(new TextDecoder().decode(data))
    } catch { throw new EngineError("model-foreign") }
  })
  model = new GPT2(config as Config, files[2].data)
  tokenizer = new Tokenizer(vocabulary)
  cache = new KVCache(config as Config)
  read = []
}

async function load(base: string, fresh = false): Promise<void> {
  const files = []
  for (const name of NAMES) files.push(await fetchFile(new URL(name, base).href, fresh))
  tell({ type: "opening" })
  try {
    open(files)
  } catch (error) {
    if (files.some(file => file.kept)) return load(base, true) // perhaps what was kept is damaged
    throw error
  }
  let kept = true
  for (const { kept: old, ...file } of files)
    if (!old) await storage.saveFile(file).catch(() => { kept = false })
  tell({ type: "ready", name: "minigpt-chat", context: model.config.n_positions, kept,
    fast: model.matmul !== plainMatmul })
}

// ------------------------------------------------------------------ answers
/** The ids of a conversation, with a quarter of the context (or less) kept free for its answer. */
function fit(messages: Message[], limit: number) {
  const size = model.config.n_positions
  return prompt(tokenizer, messages, size - Math.min(limit, size >> 2))
}

async function reply({ messages, sampling, limit, seed }: Question): Promise<void> {
  stop = false
  const { ids, forgotten } = fit(messages, limit)
  const most = Math.min(limit, model.config.n_positions - ids.length)
  const chance = seed === null ? Math.random : random(seed)
  const decoder = new TextDecoder()
  const steps = answer(model, tokenizer, cache, read, ids, sampling, most, chance, TOP)
  let finish: "stop" | "length" | "stopped" = "stopped"
  while (!stop) {
    const { done, value } = steps.next()
    if (done) {
      finish = value as "stop" | "length"
      break
    }
    if (value) {
      const [[id, logprob], ...top] = value
      tell({ type: "piece", text: decoder.decode(tokenizer.bytes[id], { stream: true }), token: { id,
        text: nameOf(id), logprob, top: top.map(([other, p]): [string, number] => [nameOf(other), p]) } })
    }
    await breathe()
  }
  tell({ type: "done", finish, forgotten })
}

/** Read the text up to a token again, and note what happened where that token was chosen. */
async function look({ messages, limit, said }: Look): Promise<void> {
  const ids = [...fit(messages, limit).ids, ...said]
  const trace = { attention: [] as Float32Array[][], logits: [] as Float32Array[] }
  read = [] // the cache is used for this
  cache.length = 0
  for (let at = 0; at < ids.length - 1; at += CHUNK)
    model.forward(ids.slice(at, Math.min(at + CHUNK, ids.length - 1)), cache)
  model.forward(ids.slice(-1), cache, trace)
  tell({ type: "inside", inside: {
    tokens: ids.map(nameOf),
    attention: trace.attention.map(heads => heads.map(weights => Array.from(weights))),
    lens: trace.logits.map(logits => {
      const [, [id, logprob]] = likeliest(logits, 1, 0)
      return [nameOf(id), Math.exp(logprob)]
    }) } })
}

// ------------------------------------------------------------------ messages
onmessage = async ({ data }: MessageEvent<ToWorker>) => {
  try {
    if (data.type === "load") await load(data.base)
    if (data.type === "stop") stop = true
    if (data.type === "answer") await reply(data)
    if (data.type === "look") await look(data)
  } catch (error) {
    if (error instanceof EngineError) tell({ type: "error", code: error.code, detail: error.detail })
    else if (error instanceof RangeError) tell({ type: "error", code: "memory", detail: "" })
    else tell({ type: "error", code: "unknown", detail: String(error) })
  }
}
