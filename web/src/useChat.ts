// The state of the page: conversations, the engine, and the answer that is being drawn.
import { useCallback, useEffect, useRef, useState } from "react"
import { add, change, choose, messagesUpTo, newConversation, parseFile, path, removeEmpty, ROOT } from "./conversations"
import { startEngine, type Engine, type Info } from "./engines"
import { recall, remember, storage, usual } from "./storage"
import { text } from "./text"
import { asPageError, PageError, type Conversation, type Node, type Settings, type Token } from "./types"

export type EngineState =
  | { state: "finding" }
  | { state: "loading", done: number, total: number | null }
  | { state: "ready", info: Info }
  | { state: "failed", error: PageError }

export interface Problem { error: PageError, talk?: string, node?: string } // node: the message without an answer

type Talks = Record<string, Conversation>

export function useChat() {
  const [settings, setSettings] = useState<Settings>(() => ({ ...usual, ...recall("settings", {}) }))
  const [talks, setTalks] = useState<Talks>({})
  const [loaded, setLoaded] = useState(false)
  const [openId, setOpenId] = useState<string>("")
  const [draftTalk, setDraftTalk] = useState(() => newConversation())
  const [engineState, setEngineState] = useState<EngineState>({ state: "finding" })
  const [running, setRunning] = useState<{ talk: string, node: string } | null>(null)
  const [problem, setProblem] = useState<Problem | null>(null)
  const [notice, setNotice] = useState("") // said to screen readers, and shown where it matters
  const engine = useRef<Engine | null>(null)
  const abort = useRef<AbortController | null>(null)
  const latest = useRef<Talks>({}) // what `talks` will be
  const dirty = useRef(new Set<string>())
  const keeps = useRef(true)

  const talk = talks[openId] ?? draftTalk

  // ---------------------------------------------------------------- what the browser keeps
  const storageFailed = useCallback(() => {
    if (keeps.current) setProblem({ error: new PageError("no-storage") })
    keeps.current = false
  }, [])

  const flush = useCallback(() => {
    if (keeps.current) for (const id of dirty.current) {
      const one = latest.current[id]
      storage.saveConversation(one).then(() => {
        if (latest.current[id] === one) dirty.current.delete(id)
        if (!dirty.current.size) remember("unsaved", []) // or an old version would come back at the next start
      }, storageFailed)
    }
  }, [storageFailed])

  /** The page may be gone before the database has written: what is left goes where writing does not wait. */
  const leave = useCallback(() => {
    flush()
    remember("unsaved", [...dirty.current].map(id => latest.current[id]))
  }, [flush])

  useEffect(() => {
    storage.conversations().then(found => {
      const unsaved = recall<Conversation[]>("unsaved", [])
      for (const one of unsaved) dirty.current.add(one.id)
      latest.current = { ...Object.fromEntries([...found, ...unsaved].map(one => [one.id, one])), ...latest.current }
      setTalks(latest.current)
      setOpenId(id => id || recall("open", ""))
    }, storageFailed).finally(() => setLoaded(true))
    const timer = setInterval(flush, 500)
    addEventListener("pagehide", leave)
    return () => {
      clearInterval(timer)
      removeEventListener("pagehide", leave)
    }
  }, [flush, leave, storageFailed])

  useEffect(() => remember("settings", settings), [settings])
  useEffect(() => {
    if (loaded) remember("open", openId)
  }, [loaded, openId])

  /** Put a conversation in the list; it is written down soon. */
  const keep = useCallback((one: Conversation) => {
    latest.current = { ...latest.current, [one.id]: one }
    dirty.current.add(one.id)
    setTalks(latest.current)
  }, [])

  // ---------------------------------------------------------------- the engine
  const { engine: kind, address, key } = settings
  const [attempt, setAttempt] = useState(0)
  useEffect(() => {
    let current = true
    setEngineState({ state: "finding" })
    setProblem(old => old?.error.code === "no-storage" ? old : null)
    const progress = (done: number, total: number | null) => {
      if (current) setEngineState({ state: "loading", done, total })
    }
    startEngine({ ...usual, engine: kind, address, key }, progress).then(([started, info]) => {
      if (!current) return started.close()
      engine.current = started
      setEngineState({ state: "ready", info })
    }, error => {
      if (current) setEngineState({ state: "failed", error: asPageError(error) })
    })
    return () => {
      current = false
      abort.current?.abort()
      engine.current?.close()
      engine.current = null
    }
  }, [kind, address, key, attempt])

  // ---------------------------------------------------------------- answers
  const stop = useCallback(() => abort.current?.abort(), [])

  /** Let the model answer the user's message `asked`. */
  const reply = useCallback(async (before: Conversation, asked: Node) => {
    setProblem(null)
    if (!engine.current) {
      keep(before)
      setProblem({ error: new PageError("busy", text.finding), talk: before.id, node: asked.id })
      return
    }
    const [begun, node] = add(before, asked.id, "assistant", "")
    keep(begun)
    setRunning({ talk: begun.id, node: node.id })
    setNotice(text.answering)
    const controller = abort.current = new AbortController()
    let content = "", shown = 0
    const tokens: Token[] = []
    const update = (fields: Partial<Node>) => {
      const now = latest.current[begun.id]
      if (now) keep(change(now, node.id, fields))
    }
    try {
      const done = await engine.current.answer(messagesUpTo(begun, asked.id), settings, controller.signal,
        (piece, more) => {
          content += piece
          tokens.push(...more)
          if (performance.now() - shown < 50) return
          shown = performance.now()
          update({ content })
        })
      update({ content, tokens, ...done })
      if (done.finish === "stopped" && !content && latest.current[begun.id])
        keep(removeEmpty(latest.current[begun.id], node.id))
      setNotice(done.finish === "stopped" ? text.stopped : text.answered(content))
    } catch (error) {
      update({ content, tokens, finish: "stopped" })
      if (latest.current[begun.id]) keep(removeEmpty(latest.current[begun.id], node.id))
      setProblem({ error: asPageError(error), talk: begun.id, node: asked.id })
      setNotice("")
    } finally {
      setRunning(null)
      abort.current = null
    }
  }, [keep, settings])

  const say = useCallback((content: string) => {
    const nodes = path(talk)
    const last = nodes.at(-1)
    // A message that got no answer is followed by another version of it, not by a second one.
    const parent = last ? (last.role === "user" ? last.parent : last.id) : ROOT
    const [next, asked] = add(talk, parent, "user", content)
    setOpenId(next.id)
    if (next.id === draftTalk.id) setDraftTalk(newConversation())
    void reply(next, asked)
  }, [talk, draftTalk, reply])

  const editMessage = useCallback((node: Node, content: string) => {
    const [next, asked] = add(talk, node.parent, "user", content)
    void reply(next, asked)
  }, [talk, reply])

  const again = useCallback((asked: Node) => void reply(talk, asked), [talk, reply])

  const show = useCallback((node: Node) => keep(choose(talk, node)), [talk, keep])

  // ---------------------------------------------------------------- the list
  const open = useCallback((id: string) => {
    setOpenId(id)
    setProblem(old => old?.talk ? null : old)
  }, [])

  const begin = useCallback(() => {
    setDraftTalk(newConversation())
    open("")
  }, [open])

  const update = useCallback((one: Conversation, fields: Partial<Conversation>) => {
    const changed = { ...one, ...fields }
    if (one.id in latest.current) keep(changed)
    else setDraftTalk(changed)
  }, [keep])

  const remove = useCallback((ids: string[]) => {
    latest.current = Object.fromEntries(Object.entries(latest.current).filter(([id]) => !ids.includes(id)))
    setTalks(latest.current)
    for (const id of ids) {
      dirty.current.delete(id)
      storage.deleteConversation(id).catch(storageFailed)
    }
    if (running && ids.includes(running.talk)) stop()
    if (ids.includes(openId)) open("")
  }, [openId, open, running, stop, storageFailed])

  const importFiles = useCallback(async (files: File[]) => {
    try {
      const found = (await Promise.all(files.map(async file => parseFile(await file.text(), file.name)))).flat()
      found.forEach(keep)
      if (found.length === 1) open(found[0].id)
      setNotice(text.imported(found.length))
      return found.length
    } catch (error) {
      setProblem({ error: asPageError(error) })
      return 0
    }
  }, [keep, open])

  return { settings, setSettings, talk, talks, open, begin, update, remove, importFiles, say, editMessage, again,
    show, stop, running, problem, setProblem, notice, engineState, engine,
    restart: () => setAttempt(n => n + 1) }
}

export type Chat = ReturnType<typeof useChat>
