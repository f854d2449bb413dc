// What the browser keeps: conversations and the model's files in IndexedDB, settings beside them.
// Every function may fail (private windows, a full disk); the page then goes on without.
import type { Conversation, Settings } from "./types"

type Store = "conversations" | "files"
export interface KeptFile { url: string, tag: string, data: ArrayBuffer }

let opened: Promise<IDBDatabase> | undefined

function database(): Promise<IDBDatabase> {
  return opened ??= new Promise((resolve, reject) => {
    const request = indexedDB.open("minigpt", 1)
    request.onupgradeneeded = () => {
      request.result.createObjectStore("conversations", { keyPath: "id" })
      request.result.createObjectStore("files", { keyPath: "url" })
    }
    request.onsuccess = () => resolve(request.result)
    request.onerror = () => reject(request.error)
  })
}

async function run<T>(store: Store, mode: IDBTransactionMode,
                      action: (store: IDBObjectStore) => IDBRequest<T>): Promise<T> {
  const transaction = (await database()).transaction(store, mode)
  const request = action(transaction.objectStore(store))
  if (mode === "readwrite") transaction.commit?.() // at once, should the page be left now
  return new Promise((resolve, reject) => {
    transaction.oncomplete = () => resolve(request.result)
    transaction.onabort = transaction.onerror = () => reject(transaction.error)
  })
}

export const storage = {
  conversations: () => run<Conversation[]>("conversations", "readonly", s => s.getAll()),
  saveConversation: (talk: Conversation) => run("conversations", "readwrite", s => s.put(talk)),
  deleteConversation: (id: string) => run("conversations", "readwrite", s => s.delete(id)),
  deleteConversations: () => run("conversations", "readwrite", s => s.clear()),
  file: (url: string) => run<KeptFile | undefined>("files", "readonly", s => s.get(url)),
  saveFile: (file: KeptFile) => run("files", "readwrite", s => s.put(file)),
  deleteFiles: () => run("files", "readwrite", s => s.clear()),
}

export const usual: Settings = {
  engine: "auto", address: "", key: "", temperature: 0.7, top_k: 50, top_p: 0.9,
  repetition_penalty: 1.1, max_tokens: 256, seed: null, theme: "auto",
}

/** A small thing that is kept as text: settings, the open conversation. */
export function recall<T>(name: string, fallback: T): T {
  try {
    return JSON.parse(localStorage.getItem(`minigpt.${name}`) ?? "null") ?? fallback
  } catch { return fallback }
}

export function remember(name: string, value: unknown): void {
  try {
    localStorage.setItem(`minigpt.${name}`, JSON.stringify(value))
  } catch { /* the page says elsewhere that nothing is kept */ }
}
