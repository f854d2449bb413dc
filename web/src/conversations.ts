// A conversation is a tree: to edit a message or to ask for another answer adds a sibling. What is
// shown is the path of the chosen children. All functions return a new conversation.
import { text } from "./text"
import { PageError, type Conversation, type Message, type Node, type Role } from "./types"

export const ROOT = "root"
const newId = () => Array.from(crypto.getRandomValues(new Uint8Array(9)), b => b.toString(36)).join("")

export function newConversation(system = ""): Conversation {
  return { id: newId(), title: text.untitled, system, nodes: {}, chosen: {}, updated: Date.now() }
}

/** The messages that are shown, first to last. */
export function path(talk: Conversation): Node[] {
  const nodes: Node[] = []
  for (let at = talk.chosen[ROOT]; at in talk.nodes; at = talk.chosen[at]) nodes.push(talk.nodes[at])
  return nodes
}

/** All versions of a message, oldest first. */
export function versions(talk: Conversation, node: Node): Node[] {
  return Object.values(talk.nodes).filter(n => n.parent === node.parent)
}

export function add(talk: Conversation, parent: string, role: Role, content: string): [Conversation, Node] {
  const node: Node = { id: newId(), parent, role, content }
  const first = role === "user" && !Object.keys(talk.nodes).length && talk.title === text.untitled
  return [{ ...talk, title: first ? titleOf(content) : talk.title, updated: Date.now(),
    nodes: { ...talk.nodes, [node.id]: node }, chosen: { ...talk.chosen, [parent]: node.id } }, node]
}

export function change(talk: Conversation, id: string, fields: Partial<Node>): Conversation {
  if (!(id in talk.nodes)) return talk
  return { ...talk, updated: Date.now(), nodes: { ...talk.nodes, [id]: { ...talk.nodes[id], ...fields } } }
}

export function choose(talk: Conversation, node: Node): Conversation {
  return { ...talk, chosen: { ...talk.chosen, [node.parent]: node.id } }
}

/** Take a message away that has no content yet; an earlier version is shown again. */
export function removeEmpty(talk: Conversation, id: string): Conversation {
  const { [id]: gone, ...nodes } = talk.nodes
  if (!gone || gone.content) return talk
  const { [gone.parent]: _, ...chosen } = talk.chosen
  const others = Object.values(nodes).filter(n => n.parent === gone.parent)
  if (others.length) chosen[gone.parent] = others[others.length - 1].id
  return { ...talk, nodes, chosen }
}

const titleOf = (content: string) => content.trim().split("\n")[0].slice(0, 60) || text.untitled

/** The messages that a model is told, up to a node. */
export function messagesUpTo(talk: Conversation, id: string): Message[] {
  const nodes: Node[] = []
  for (let at = id; at in talk.nodes; at = talk.nodes[at].parent) nodes.unshift(talk.nodes[at])
  const said = nodes.map(({ role, content }) => ({ role, content }))
  return talk.system.trim() ? [{ role: "system", content: talk.system }, ...said] : said
}

/** The course's form: {"messages": [{"role", "content"}, ...]}, whole exchanges only. */
export function transcript(talk: Conversation): { messages: Message[] } {
  const nodes = path(talk)
  if (nodes.at(-1)?.role === "user") nodes.pop()
  return { messages: nodes.length ? messagesUpTo(talk, nodes.at(-1)!.id) : [] }
}

/** Conversations of a file: JSON with one, or a line of JSON for each. */
export function parseFile(data: string, name: string): Conversation[] {
  let found: unknown[]
  try {
    found = [JSON.parse(data)]
  } catch {
    try {
      found = data.split("\n").filter(line => line.trim()).map(line => JSON.parse(line))
    } catch { throw new PageError("bad-import", name) }
  }
  if (!found.length) throw new PageError("bad-import", name)
  return found.map(one => fromMessages((one as { messages?: unknown })?.messages ?? one, name))
}

function fromMessages(messages: unknown, name: string): Conversation {
  const wrong = new PageError("bad-import", name)
  if (!Array.isArray(messages) || !messages.length) throw wrong
  let talk = newConversation(), parent = ROOT
  messages.forEach((message: Partial<Message> | null, n) => {
    const { role, content } = message ?? {}
    if (typeof content !== "string") throw wrong
    if (role === "system" && n === 0) {
      talk.system = content
      return
    }
    const due = parent === ROOT || talk.nodes[parent].role === "assistant" ? "user" : "assistant"
    if (role !== due) throw wrong
    const [next, node] = add(talk, parent, role, content.toWellFormed?.() ?? content)
    talk = next
    parent = node.id
  })
  if (parent === ROOT) throw wrong
  return talk
}

export function search(talks: Conversation[], query: string): Conversation[] {
  const words = query.toLowerCase().split(/\s+/).filter(Boolean)
  return talks.filter(talk => {
    const all = [talk.title, ...Object.values(talk.nodes).map(n => n.content)].join("\n").toLowerCase()
    return words.every(word => all.includes(word))
  }).sort((a, b) => b.updated - a.updated)
}
