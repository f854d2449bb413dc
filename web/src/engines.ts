// Two engines behind one interface: a server that speaks OpenAI's API, or the network in a worker.
import { PageError, type Message, type Settings, type Token } from "./types"
import type { FromWorker, Inside, ToWorker } from "./worker"

export interface Info { name: string, context: number | null, place: "server" | "browser"
  slow?: boolean, kept?: boolean }
export interface Done { finish: "stop" | "length" | "stopped", forgotten: number }
export type Progress = (done: number, total: number | null) => void

export interface Engine {
  start(progress: Progress): Promise<Info>
  /** Answer a conversation; `piece` hears of each new part. Raises PageError. */
  answer(messages: Message[], settings: Settings, signal: AbortSignal,
         piece: (text: string, tokens: Token[]) => void): Promise<Done>
  /** What the network did where the next token after `said` was chosen. */
  look?(messages: Message[], settings: Settings, said: number[]): Promise<Inside>
  close(): void
}

/** The engine that the settings ask for, started. */
export async function startEngine(settings: Settings, progress: Progress): Promise<[Engine, Info]> {
  const start = async (engine: Engine): Promise<[Engine, Info]> => {
    try {
      return [engine, await engine.start(progress)]
    } catch (error) {
      engine.close()
      throw error
    }
  }
  if (settings.engine === "browser") return start(new BrowserEngine())
  try {
    return await start(new ServerEngine(settings))
  } catch (error) {
    const here = settings.engine === "auto" && !settings.address
    if (here && error instanceof PageError && error.code === "no-api") return start(new BrowserEngine())
    throw error
  }
}

// ------------------------------------------------------------------ a server
interface Chunk {
  error?: { message: string, code?: string }
  choices?: { delta: { content?: string }, finish_reason: string | null
    logprobs?: { content?: { token: string, logprob: number
      top_logprobs: { token: string, logprob: number }[] }[] } | null }[]
}

export class ServerEngine implements Engine {
  private base: URL
  private model = ""
  private context: number | null = null

  constructor(private settings: Settings) {
    const address = settings.address.trim()
    try {
      this.base = new URL(address ? `${address.replace(/\/(v1\/?)?$/, "")}/` : "./", document.baseURI)
    } catch { throw new PageError("bad-address", address) }
    if (!/^https?:$/.test(this.base.protocol)) throw new PageError("bad-address", address)
  }

  async start(): Promise<Info> {
    const response = await this.fetch("v1/models")
    const found = await response.json().catch(() => null)
    const card = found?.data?.[0]
    if (typeof card?.id !== "string") throw new PageError("no-api", this.base.href)
    this.model = card.id
    this.context = card.max_model_len ?? null
    return { name: card.id, context: this.context, place: "server" }
  }

  /** Leave out the oldest exchanges until the server takes the conversation. */
  async answer(messages: Message[], settings: Settings, signal: AbortSignal,
               piece: (text: string, tokens: Token[]) => void): Promise<Done> {
    const first = messages[0].role === "system" ? 1 : 0
    for (let forgotten = 0; ; forgotten++) {
      try {
        return { ...await this.ask(messages, settings, signal, piece), forgotten }
      } catch (error) {
        if (!(error instanceof PageError) || error.code !== "too-long") throw error
        if (messages.length <= first + 1) {
          const most = (this.context ?? 0) >> 2 // a shorter answer may fit
          if (!(most > 0 && most < settings.max_tokens)) throw error
          settings = { ...settings, max_tokens: most }
          forgotten--
          continue
        }
        messages = [...messages.slice(0, first), ...messages.slice(first + 2)]
      }
    }
  }

  private async ask(messages: Message[], settings: Settings, signal: AbortSignal,
                    piece: (text: string, tokens: Token[]) => void): Promise<Omit<Done, "forgotten">> {
    const { temperature, top_p, top_k, repetition_penalty, max_tokens, seed } = settings
    const body = { model: this.model, messages, stream: true, temperature, top_p, max_tokens,
      logprobs: true, top_logprobs: 5, ...seed !== null && { seed }, ...top_k > 0 && { top_k },
      ...repetition_penalty !== 1 && { repetition_penalty } }
    let finish: Done["finish"] | undefined
    try {
      const response = await this.fetch("v1/chat/completions", { method: "POST", signal,
        headers: { "Content-Type": "application/json" }, body: JSON.stringify(body) })
      for await (const data of events(response)) {
        const { error, choices } = JSON.parse(data) as Chunk
        if (error) throw new PageError("busy", error.message)
        const choice = choices?.[0]
        if (!choice) continue
        const tokens = choice.logprobs?.content?.map(({ token, logprob, top_logprobs }): Token => ({
          text: token, logprob, top: top_logprobs.map(t => [t.token, t.logprob]) })) ?? []
        piece(choice.delta.content ?? "", tokens)
        if (choice.finish_reason) finish = choice.finish_reason === "length" ? "length" : "stop"
      }
    } catch (error) {
      if (signal.aborted) return { finish: "stopped" }
      throw error instanceof PageError ? error : new PageError("broke-off")
    }
    if (!finish) throw new PageError("broke-off")
    return { finish }
  }

  private async fetch(path: string, options: RequestInit = {}): Promise<Response> {
    const key = this.settings.key.trim()
    const headers = { ...options.headers, ...key && { Authorization: `Bearer ${key}` } }
    let response: Response
    try {
      response = await fetch(new URL(path, this.base), { ...options, headers })
    } catch (error) {
      throw options.signal?.aborted ? error : new PageError("server-gone")
    }
    if (response.ok) return response
    const { error } = await response.json().catch(() => ({})) as { error?: { message?: string, code?: string,
      param?: string } }
    const message = error?.message ?? response.statusText
    switch (response.status) {
      case 401: case 403: throw new PageError("key")
      case 429: throw new PageError("queue", response.headers.get("Retry-After") ?? "")
      case 413: throw new PageError("too-long")
      case 502: case 503: case 504: throw new PageError("busy", message)
    }
    if (error?.code === "context_length_exceeded" || error?.param === "messages") throw new PageError("too-long")
    if (!error) throw new PageError("no-api", this.base.href)
    throw new PageError("server-says", message)
  }

  close(): void {}
}

/** The data of a stream of server-sent events, until its [DONE]. */
async function* events(response: Response): AsyncGenerator<string> {
  const reader = response.body!.pipeThrough(new TextDecoderStream()).getReader()
  for (let rest = ""; ;) {
    const { value, done } = await reader.read()
    if (done) return
    const lines = (rest + value).split("\n")
    rest = lines.pop()!
    for (const line of lines) {
      if (!line.startsWith("data:")) continue
      const data = line.slice(5).trim()
      if (data === "[DONE]") return
      yield data
    }
  }
}

// ------------------------------------------------------------------ this browser
export class BrowserEngine implements Engine {
  private worker: Worker
  private listen: (message: FromWorker) => void = () => {}

  constructor() {
    const file = import.meta.env.DEV ? "src/worker.ts" : "worker.js"
    try {
      this.worker = new Worker(new URL(file, document.baseURI), { type: "module" })
    } catch { throw new PageError("no-worker") }
    this.worker.onmessage = ({ data }) => this.listen(data)
    this.worker.onerror = () => this.listen({ type: "error", code: "no-worker", detail: "" })
  }

  /** Send something; resolves when `hear` gives a value for what comes back. */
  private ask<T>(message: ToWorker, hear: (message: FromWorker) => T | undefined): Promise<T> {
    return new Promise((resolve, reject) => {
      this.listen = answer => {
        if (answer.type === "error") return reject(new PageError(answer.code, answer.detail))
        const value = hear(answer)
        if (value !== undefined) resolve(value)
      }
      this.worker.postMessage(message)
    })
  }

  start(progress: Progress): Promise<Info> {
    return this.ask({ type: "load", base: new URL("./model/", document.baseURI).href }, message => {
      if (message.type === "progress") progress(message.done, message.total)
      if (message.type !== "ready") return undefined
      return { name: message.name, context: message.context, place: "browser", slow: !message.fast,
        kept: message.kept } as Info
    })
  }

  async answer(messages: Message[], settings: Settings, signal: AbortSignal,
               piece: (text: string, tokens: Token[]) => void): Promise<Done> {
    const { temperature, top_k, top_p, repetition_penalty, max_tokens: limit, seed } = settings
    const stop = () => this.worker.postMessage({ type: "stop" } satisfies ToWorker)
    signal.addEventListener("abort", stop, { once: true })
    try {
      return await this.ask({ type: "answer", messages, limit, seed,
        sampling: { temperature, top_k, top_p, repetition_penalty } }, message => {
        if (message.type === "piece") piece(message.text, [message.token])
        return message.type === "done" ? { finish: message.finish, forgotten: message.forgotten } : undefined
      })
    } finally {
      signal.removeEventListener("abort", stop)
    }
  }

  look(messages: Message[], settings: Settings, said: number[]): Promise<Inside> {
    return this.ask({ type: "look", messages, limit: settings.max_tokens, said },
      message => message.type === "inside" ? message.inside : undefined)
  }

  close(): void {
    this.worker.terminate()
  }
}
