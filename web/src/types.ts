export type Role = "user" | "assistant"
export interface Message { role: Role | "system", content: string }

/** A token that was said: its chance, and the likeliest ones in its place. */
export interface Token { text: string, logprob: number, top: [string, number][], id?: number }

/** A message in the tree of a conversation; its siblings are other versions of it. */
export interface Node {
  id: string
  parent: string // another node's id, or ROOT
  role: Role
  content: string
  tokens?: Token[]
  finish?: "stop" | "length" | "stopped"
  forgotten?: number
}

export interface Conversation {
  id: string
  title: string
  system: string
  nodes: Record<string, Node>
  chosen: Record<string, string> // node or ROOT -> which of its children is shown
  updated: number
}

export interface Settings {
  engine: "auto" | "server" | "browser"
  address: string
  key: string
  temperature: number
  top_k: number
  top_p: number
  repetition_penalty: number
  max_tokens: number
  seed: number | null
  theme: "auto" | "light" | "dark"
}

/** An error that text.errors puts into words. */
export class PageError extends Error {
  constructor(readonly code: string, readonly detail = "") { super(`${code} ${detail}`.trim()) }
}

export function asPageError(error: unknown): PageError {
  return error instanceof PageError ? error : new PageError("unknown", String(error))
}
