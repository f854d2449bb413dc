// A weights file: eight bytes that give the length of the header, the header as JSON ({name:
// {dtype, shape, data_offsets}}), then all the numbers. minigpt/engine/weights.py writes it:
// matrices as int8 rows and one fp16 scale a row, everything else as fp16.

/** An error that the page explains; `detail` is what it is about. */
export class EngineError extends Error {
  constructor(readonly code: string, readonly detail = "") { super(`${code} ${detail}`.trim()) }
}

/** A function that finds the bytes of a tensor, and how many bytes there are in all. */
export function openTensors(file: ArrayBuffer) {
  const size = file.byteLength
  const length = size < 8 ? NaN : Number(new DataView(file).getBigUint64(0, true))
  if (!(length <= size - 8)) throw new EngineError("model-foreign")
  let entries: Record<string, any>
  try {
    entries = JSON.parse(new TextDecoder().decode(new Uint8Array(file, 8, length)))
  } catch { throw new EngineError("model-foreign") }
  if (entries.__metadata__?.format !== "minigpt-int8") throw new EngineError("model-format")
  delete entries.__metadata__
  const start = 8 + length
  const end = start + Math.max(...Object.values(entries).map(entry => entry.data_offsets[1]))
  if (end > size) throw new EngineError("model-short", `${size} / ${end}`)
  return (name: string, dtype: "I8" | "F16", ...shape: number[]): ArrayBuffer => {
    const [from, to] = entries[name]?.data_offsets ?? [0, 0]
    const bytes = shape.reduce((a, b) => a * b) * (dtype === "I8" ? 1 : 2)
    if (entries[name]?.dtype !== dtype || `${entries[name].shape}` !== `${shape}`
      || to - from !== bytes) throw new EngineError("model-tensor", name)
    return file.slice(start + from, start + to)
  }
}

/** The number that 16 bits stand for (IEEE 754, half precision). */
export function halfToFloat(bits: number): number {
  const sign = bits & 0x8000 ? -1 : 1, exponent = (bits >> 10) & 31, fraction = bits & 1023
  if (exponent === 31) return NaN // or infinity: no weight is either
  if (exponent === 0) return sign * fraction * 2 ** -24
  return sign * (1 + fraction / 1024) * 2 ** (exponent - 15)
}
