// Chapter 03's network again: token ids in, logits out. Names are those of minigpt/gpt2.py. Arrays
// are flat: row t of x (T, C) begins at t * C.
import { Heap, type Matmul, type Matrix } from "./matmul"
import { EngineError, halfToFloat, openTensors } from "./safetensors"

export interface Config { // of the model's config.json
  vocab_size: number, n_positions: number, n_layer: number, n_head: number, n_embd: number
  layer_norm_epsilon: number, activation_function: string }
interface LayerNorm { weight: Float32Array, bias: Float32Array }
interface Block { ln_1: LayerNorm, c_attn: Matrix, attn_proj: Matrix
  ln_2: LayerNorm, c_fc: Matrix, mlp_proj: Matrix }

/** Keys and values of the tokens read so far, (H, n_positions, D) for each block. */
export class KVCache {
  length = 0; k: Float32Array[]; v: Float32Array[]
  constructor({ n_layer, n_positions, n_embd }: Config) {
    const room = () => new Float32Array(n_positions * n_embd)
    this.k = Array.from({ length: n_layer }, room)
    this.v = Array.from({ length: n_layer }, room)
  }
}

/** At the last token: [block][head] S attention weights; logits, were each block the last one. */
export interface Trace { attention: Float32Array[][], logits: Float32Array[] }

export const CHUNK = 32 // tokens of a prompt that are read at once

export class GPT2 {
  matmul: Matmul
  private wte: Matrix; private wpe: Float32Array
  private blocks: Block[]; private ln_f: LayerNorm
  private x; private h; private qkv; private up; private logits // (T, C) twice, 3C, 4C; (V,)

  constructor(readonly config: Config, file: ArrayBuffer, fast = true) {
    const { n_embd: C, n_layer, vocab_size: V } = config
    if (config.activation_function !== "gelu_new" || C % (2 * config.n_head))
      throw new EngineError("model-config")
    const find = openTensors(file)
    const heap = new Heap(2 * file.byteLength + 4 * (9 * CHUNK * C + 2 * V), fast)
    const floats = (name: string, ...shape: number[]): Float32Array => {
      const halves = new Uint16Array(find(name, "F16", ...shape))
      const numbers = heap.floats(halves.length)
      halves.forEach((bits, i) => { numbers[i] = halfToFloat(bits) })
      if (numbers.some(Number.isNaN)) throw new EngineError("model-nan", name)
      return numbers
    }
    const norm = (name: string): LayerNorm =>
      ({ weight: floats(`${name}.weight`, C), bias: floats(`${name}.bias`, C) })
    const matrix = (name: string, rows: number, cols: number): Matrix => {
      const steps = heap.bytes(rows * cols)
      steps.set(new Int8Array(find(`${name}.weight`, "I8", rows, cols)))
      const bias = name === "wte" ? heap.floats(rows) : floats(`${name}.bias`, rows)
      return { rows, cols, steps, bias, scale: floats(`${name}.weight.scale`, rows) }
    }
    this.matmul = heap.matmul
    this.wte = matrix("wte", V, C)
    this.wpe = floats("wpe.weight", config.n_positions, C)
    this.blocks = Array.from({ length: n_layer }, (_, n) => `blocks.${n}`).map(b => ({
      ln_1: norm(`${b}.ln_1`), c_attn: matrix(`${b}.attn.c_attn`, 3 * C, C),
      attn_proj: matrix(`${b}.attn.c_proj`, C, C), ln_2: norm(`${b}.ln_2`),
      c_fc: matrix(`${b}.mlp.c_fc`, 4 * C, C), mlp_proj: matrix(`${b}.mlp.c_proj`, C, 4 * C) }))
    this.ln_f = norm("ln_f")
    this.x = heap.floats(CHUNK * C), this.h = heap.floats(CHUNK * C)
    this.qkv = heap.floats(CHUNK * 3 * C), this.up = heap.floats(CHUNK * 4 * C)
    this.logits = heap.floats(V)
  }

  /** The logits after the last of at most CHUNK ids; the next call overwrites them. */
  forward(ids: number[], cache: KVCache, trace?: Trace): Float32Array {
    const { x, wte, wpe, config: { n_embd: C } } = this, T = ids.length, past = cache.length
    for (let t = 0; t < T; t++)
      for (let c = 0; c < C; c++)
        x[t * C + c] = wte.steps[ids[t] * C + c] * wte.scale[ids[t]] + wpe[(past + t) * C + c]
    this.blocks.forEach((block, n) => {
      this.block(block, n, T, cache, trace)
      trace?.logits.push(this.head(T).slice())
    })
    cache.length += T
    return this.head(T)
  }

  /** Attention, then MLP, each adding to the residual stream x (T, C). */
  private block(block: Block, n: number, T: number, cache: KVCache, trace?: Trace): void {
    const { x, h, qkv, up } = this, size = T * this.config.n_embd
    this.norm(block.ln_1, T)
    this.matmul(h, block.c_attn, qkv, T)
    trace?.attention.push([])
    this.attend(n, T, cache, trace?.attention[n])
    this.matmul(h, block.attn_proj, up, T)
    for (let i = 0; i < size; i++) x[i] += up[i]
    this.norm(block.ln_2, T)
    this.matmul(h, block.c_fc, up, T)
    for (let i = 0; i < 4 * size; i++) up[i] = gelu(up[i])
    this.matmul(up, block.mlp_proj, h, T)
    for (let i = 0; i < size; i++) x[i] += h[i]
  }

  /** h (T, C) = layer norm of x */
  private norm({ weight, bias }: LayerNorm, T: number, from = 0): void {
    const { x, h, config: { n_embd: C, layer_norm_epsilon: eps } } = this
    for (let t = from; t < T; t++) {
      let mean = 0, variance = 0
      for (let c = 0; c < C; c++) mean += x[t * C + c] / C
      for (let c = 0; c < C; c++) variance += (x[t * C + c] - mean) ** 2 / C
      const scale = 1 / Math.sqrt(variance + eps)
      for (let c = 0; c < C; c++)
        h[t * C + c] = (x[t * C + c] - mean) * scale * weight[c] + bias[c]
    }
  }

  /** h (T, C) = what the heads bring back, from qkv (T, 3C) and the cache */
  private attend(n: number, T: number, cache: KVCache, trace?: Float32Array[]): void {
    const { h, config: { n_embd: C, n_head: H, n_positions } } = this, D = C / H
    for (let t = 0; t < T; t++)
      for (let head = 0; head < H; head++) {
        const [q, newK, newV] = [0, C, 2 * C].map(at => // (D,) each
          this.qkv.subarray(t * 3 * C + at + head * D, t * 3 * C + at + head * D + D))
        const S = cache.length + t + 1, row = head * n_positions * D
        const k = cache.k[n].subarray(row, row + S * D), v = cache.v[n].subarray(row, row + S * D)
        k.set(newK, (S - 1) * D)
        v.set(newV, (S - 1) * D)
        const weights = new Float32Array(S), mixed = new Float64Array(D)
        for (let s = 0; s < S; s++) {
          let even = 0, odd = 0 // two sums at once: half the waiting for an addition
          for (let d = 0; d < D; d += 2) {
            even += q[d] * k[s * D + d]
            odd += q[d + 1] * k[s * D + d + 1]
          }
          weights[s] = (even + odd) / Math.sqrt(D)
        }
        softmax(weights)
        for (let s = 0; s < S; s++)
          for (let d = 0; d < D; d++) mixed[d] += weights[s] * v[s * D + d]
        h.set(mixed, t * C + head * D)
        if (t === T - 1) trace?.push(weights)
      }
  }

  /** Logits (V,) of the last of T tokens; the head is wte again. */
  private head(T: number): Float32Array {
    this.norm(this.ln_f, T, T - 1)
    this.matmul(this.h.subarray((T - 1) * this.config.n_embd), this.wte, this.logits, 1)
    return this.logits
  }
}

const gelu = (x: number): number => // by tanh, as OpenAI's model.py
  x / 2 * (1 + Math.tanh(Math.sqrt(2 / Math.PI) * (x + 0.044715 * x * x * x)))

function softmax(scores: Float32Array): void {
  const most = scores.reduce((a, b) => Math.max(a, b))
  let sum = 0
  for (let i = 0; i < scores.length; i++) sum += scores[i] = Math.exp(scores[i] - most)
  for (let i = 0; i < scores.length; i++) scores[i] /= sum
}
