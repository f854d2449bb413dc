// Chapter 07's format (ChatML), and the loop that draws an answer. Texts are encoded without
// special tokens: nothing that is typed opens a turn.
import type { Tokenizer } from "./bpe"
import { CHUNK, type GPT2, type KVCache } from "./gpt2"
import { EngineError } from "./safetensors"
import { candidates, likeliest, pick, type Sampling } from "./sampling"

export interface Message { role: "system" | "user" | "assistant", content: string }
const SPACE = String.raw`[\p{Z}\t-\r\x1c-\x1f\x85]` // what Python's strip() takes off
const EDGES = new RegExp(`^${SPACE}+|(?<!${SPACE})${SPACE}+$`, "gu")

/** Ids of a conversation up to where its answer begins, at most `room`, and how many of the oldest
 * exchanges had to be left out for that. */
export function prompt(tokenizer: Tokenizer, messages: Message[], room: number) {
  const [text, start, end] = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"].map(
    name => tokenizer.special.get(name)!)
  const most = room * tokenizer.longest + 1 // characters, which never fit
  const cut = (text: string) => text.replace(EDGES, "").slice(0, most)
  let turns = messages.map(({ role, content }) => ({ role, said: cut(content) }))
  const system = turns[0].role === "system" ? turns.shift()!.said : ""
  for (let forgotten = 0; ; forgotten++, turns = turns.slice(2)) {
    const ids = [text]
    turns.forEach(({ role, said }, n) => {
      const content = n === 0 && system ? `${system}\n\n${said}` : said
      ids.push(start, ...tokenizer.encode(`${role}\n`), ...tokenizer.encode(content))
      ids.push(end, ...tokenizer.encode("\n"))
    })
    ids.push(start, ...tokenizer.encode("assistant\n"))
    if (ids.length <= room) return { ids, forgotten }
    if (turns.length < 3) throw new EngineError("too-long", `${room}`)
  }
}

/** Draw an answer, each token as `likeliest` tells it (first undefined); read: the cached ids. */
export function* answer(model: GPT2, tokenizer: Tokenizer, cache: KVCache, read: number[],
    ids: number[], sampling: Sampling, limit: number, chance: () => number, top: number) {
  let same = 0
  while (same < ids.length - 1 && ids[same] === read[same]) same++
  cache.length = read.length = same
  const said: number[] = [], stops = [...tokenizer.special.values()]
  let logits: Float32Array = new Float32Array()
  for (; same < ids.length; same += CHUNK, yield undefined)
    logits = model.forward(ids.slice(same, same + CHUNK), cache)
  read.push(...ids.slice(read.length))
  while (said.length < limit) {
    const { ids: some, probabilities } = candidates(logits, said, sampling)
    const id = pick(some, probabilities, chance())
    if (stops.includes(id)) return "stop"
    said.push(id)
    yield likeliest(logits, top, id)
    logits = model.forward([id], cache)
    read.push(id)
  }
  return "length"
}
