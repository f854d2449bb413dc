// The one expensive step: int8 rows times the vectors of T tokens, in plain loops or, several times
// as fast, by WebAssembly (kernel.wat). That sees only its own memory: all arrays lie in one Heap.
import kernel from "./kernel.wat"

export interface Matrix { rows: number, cols: number
  steps: Int8Array // rows * cols
  scale: Float32Array, bias: Float32Array } // one number a row

/** y (T, rows) = x (T, cols) @ W^T + bias; the arrays have room for T up to a multiple of 4 */
export type Matmul = (x: Float32Array, W: Matrix, y: Float32Array, T: number) => void

export const plainMatmul: Matmul = (x, { rows, cols, steps, scale, bias }, y, T) => {
  for (let t = 0; t < T; t++)
    for (let r = 0; r < rows; r++) {
      let sum = 0
      for (let c = 0; c < cols; c++) sum += steps[r * cols + c] * x[t * cols + c]
      y[t * rows + r] = sum * scale[r] + bias[r]
    }
}

export class Heap {
  matmul = plainMatmul
  private buffer: ArrayBuffer
  private top = 16 // the next free byte

  constructor(bytes: number, fast = true) {
    const pages = Math.ceil(bytes / 65536) + 1
    try {
      if (!fast) throw Error("plain loops are wanted")
      const memory = new WebAssembly.Memory({ initial: pages })
      const module = new WebAssembly.Module(Uint8Array.from(atob(kernel), c => c.charCodeAt(0)))
      const run = new WebAssembly.Instance(module, { env: { memory } }).exports as any
      this.buffer = memory.buffer
      this.matmul = (x, W, y, T) => W.cols % 16 ? plainMatmul(x, W, y, T)
        : (T === 1 ? run.one : run.four)(x.byteOffset, W.steps.byteOffset, W.scale.byteOffset,
          W.bias.byteOffset, y.byteOffset, T, W.rows, W.cols)
    } catch { // no WebAssembly here, or none with vectors
      this.buffer = new ArrayBuffer(pages * 65536)
    }
  }

  floats(n: number): Float32Array { return new Float32Array(this.buffer, this.take(4 * n), n) }
  bytes(n: number): Int8Array { return new Int8Array(this.buffer, this.take(n), n) }
  private take(bytes: number): number { // vectors begin at multiples of 16
    return (this.top += Math.ceil(bytes / 16) * 16) - Math.ceil(bytes / 16) * 16
  }
}
