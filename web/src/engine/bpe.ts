// Chapter 00's tokenizer again, out of a tokenizer.json: a text is cut into words, a word into
// bytes, and learned merges join them to tokens.
const SPLIT = String.raw`'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+`
const WORDS = new RegExp(SPLIT.replaceAll("\\s", "\\p{White_Space}") // which JavaScript's \s is not
  .replace("\\S", "\\P{White_Space}"), "gu")
const LIMIT = 2 ** 20 // more than there are ids

interface TokenizerFile { added_tokens: { id: number, content: string }[]
  model: { vocab: Record<string, number>, merges: (string | string[])[] } }

/** The character that stands for each byte in the file (OpenAI's rule). */
function byteCharacters(): string[] {
  const visible = (b: number) => b >= 33 && b < 127 || b >= 161 && b !== 173
  let hidden = 256
  return Array.from({ length: 256 }, (_, b) => String.fromCharCode(visible(b) ? b : hidden++))
}

export class Tokenizer {
  special = new Map<string, number>()
  longest = 1 // bytes of the longest token
  bytes: Uint8Array[] = [] // of each token
  private byteIds: number[] // the token of each byte
  private ranks = new Map<number, number>() // a * LIMIT + b -> which merge
  private merged: number[] // which merge -> the token it makes
  private known = new Map<string, number[]>() // words seen before

  constructor({ added_tokens, model: { vocab, merges } }: TokenizerFile) {
    const characters = byteCharacters(), byteOf = new Map(characters.map((c, b) => [c, b]))
    this.byteIds = characters.map(c => vocab[c])
    for (const [text, id] of Object.entries(vocab)) {
      this.bytes[id] = Uint8Array.from(text, c => byteOf.get(c) ?? 0)
      this.longest = Math.max(this.longest, text.length)
    }
    for (const { id, content } of added_tokens) this.special.set(content, id)
    this.merged = merges.map((merge, rank) => {
      const [a, b] = typeof merge === "string" ? merge.split(" ") : merge
      this.ranks.set(vocab[a] * LIMIT + vocab[b], rank)
      return vocab[a + b]
    })
  }

  /** Ids of a text. Names of special tokens in it are plain text. */
  encode(text: string): number[] {
    return (text.match(WORDS) ?? []).flatMap(word => this.known.get(word) ?? this.merge(word))
  }

  private merge(word: string): number[] {
    let ids = Array.from(new TextEncoder().encode(word), b => this.byteIds[b])
    const rank = (i: number) => this.ranks.get(ids[i] * LIMIT + ids[i + 1]) ?? Infinity
    for (;;) {
      let best = Infinity // the earliest merge that can be made
      for (let i = 0; i + 1 < ids.length; i++) best = Math.min(best, rank(i))
      if (best === Infinity) break
      const joined: number[] = []
      for (let i = 0; i < ids.length; i++)
        joined.push(rank(i) === best ? this.merged[rank(i++)] : ids[i])
      ids = joined
    }
    this.known.set(word, ids)
    return ids
  }
}
