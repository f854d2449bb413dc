// Chapter 05's rules again: which token comes next.
export interface Sampling {
  temperature: number // 0: always the likeliest
  top_k: number // keep so many of the likeliest; 0: all
  top_p: number // keep the likeliest that together reach this; 1: all
  repetition_penalty: number // on tokens of this answer; 1: off
}

/** Which tokens may come, likeliest first, and their probabilities. */
export function candidates(logits: Float32Array, said: number[], sampling: Sampling) {
  const { temperature, top_k, top_p, repetition_penalty } = sampling
  const scores = Float64Array.from(logits)
  for (const id of new Set(said)) // less likely, whatever the sign
    scores[id] *= scores[id] < 0 ? repetition_penalty : 1 / repetition_penalty
  let ids = Array.from(scores.keys()).sort((a, b) => scores[b] - scores[a])
  if (temperature === 0) return { ids: [ids[0]], probabilities: [1] }
  const least = scores[ids[Math.min(top_k || Infinity, ids.length) - 1]]
  ids = ids.filter(id => scores[id] >= least)
  const weights = ids.map(id => Math.exp((scores[id] - scores[ids[0]]) / temperature))
  const total = weights.reduce((a, b) => a + b)
  let n = 0, reached = 0
  while (n < ids.length && reached < top_p * total) reached += weights[n++]
  return { ids: ids.slice(0, n), probabilities: weights.slice(0, n).map(w => w / reached) }
}

/** One of the ids, by chance; u is uniform in [0, 1). */
export function pick(ids: number[], probabilities: number[], u: number): number {
  return ids.find((_, i) => (u -= probabilities[i]) < 0) ?? ids[ids.length - 1]
}

/** [id, log-probability] of one token, and of the n likeliest, by the model itself. */
export function likeliest(logits: Float32Array, n: number, one: number): [number, number][] {
  const most = logits.reduce((a, b) => Math.max(a, b))
  const total = logits.reduce((sum, x) => sum + Math.exp(x - most), 0)
  const top: number[] = [] // falling
  logits.forEach((logit, id) => {
    if (top.length === n && logit <= logits[top[n - 1]]) return
    top.splice(top.filter(other => logits[other] >= logit).length, 0, id)
    top.length = Math.min(top.length, n)
  })
  return [one, ...top].map(id => [id, logits[id] - most - Math.log(total)])
}
