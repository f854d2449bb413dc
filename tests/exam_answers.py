"""A file of answers as a reader might write it, all of them right; tests/test_exam.py breaks it in many ways."""
import math
from collections import Counter

import torch
import torch.nn.functional as F

from minigpt.bpe import split_words


def join(parts, pair):
    out, i = [], 0
    while i < len(parts):
        if tuple(parts[i:i + 2]) == pair:
            out.append(parts[i] + parts[i + 1])
            i += 2
        else:
            out.append(parts[i])
            i += 1
    return out


def learn_merges(text, n):
    words = [[bytes([b]) for b in word.encode()] for word in split_words(text)]
    ids, merges = {bytes([b]): b for b in range(256)}, []
    for _ in range(n):
        counts = Counter(pair for word in words for pair in zip(word, word[1:]))
        if not counts:
            break
        best = min(counts, key=lambda pair: (-counts[pair], ids[pair[0]], ids[pair[1]]))
        ids[best[0] + best[1]] = 256 + len(merges)
        words = [join(word, best) for word in words]
        merges.append(best)
    return merges


def encode(text, merges):
    ranks, tokens = {pair: rank for rank, pair in enumerate(merges)}, []
    for word in split_words(text):
        parts = [bytes([b]) for b in word.encode()]
        while known := [pair for pair in zip(parts, parts[1:]) if pair in ranks]:
            parts = join(parts, min(known, key=ranks.get))
        tokens += parts
    return tokens


def attention(q, k, v):
    scores = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])
    later = torch.ones(q.shape[-2], q.shape[-2], dtype=torch.bool).triu(1)
    return scores.masked_fill(later, -math.inf).softmax(-1) @ v


def gpt2_logits(weights, ids, n_head):
    def norm(x, name):
        return F.layer_norm(x, x.shape[-1:], weights[f"{name}.weight"], weights[f"{name}.bias"])

    def linear(x, name):
        return F.linear(x, weights[f"{name}.weight"], weights[f"{name}.bias"])
    T, n_layer = len(ids), sum(name.endswith("ln_1.weight") for name in weights)
    x = weights["wte.weight"][ids] + weights["wpe.weight"][:T]
    for n in range(n_layer):
        h = f"blocks.{n}."
        qkv = linear(norm(x, h + "ln_1"), h + "attn.c_attn").chunk(3, -1)
        q, k, v = (part.reshape(T, n_head, -1).transpose(0, 1) for part in qkv)
        z = linear(attention(q, k, v).transpose(0, 1).reshape(T, -1), h + "attn.c_proj")
        x = x + z
        hidden = F.gelu(linear(norm(x, h + "ln_2"), h + "mlp.c_fc"), approximate="tanh")
        x = x + linear(hidden, h + "mlp.c_proj")
    return norm(x, "ln_f") @ weights["wte.weight"].T


def sample_probs(logits, temperature, top_k, top_p):
    if temperature == 0:
        return F.one_hot(logits.argmax(), len(logits))
    logits = logits / temperature
    if top_k is not None:
        least = logits.sort(descending=True).values[:top_k][-1]
        logits = logits.masked_fill(logits < least, -math.inf)
    probs = logits.softmax(-1)
    if top_p is not None:
        falling, order = probs.sort(descending=True)
        before = falling.cumsum(0) - falling
        probs = torch.zeros_like(probs).scatter(0, order, falling.masked_fill(before >= top_p, 0))
    return probs / probs.sum()


def lora_delta(x, A, B, alpha):
    return x @ A.T @ B.T * (alpha / len(A))


def bm25_scores(query, documents, k1=1.5, b=0.75):
    N, scores = len(documents), []
    mean = sum(map(len, documents)) / max(1, N)
    for document in documents:
        score = 0.0
        for term in query:
            f = document.count(term)
            if not f:
                continue
            df = sum(term in other for other in documents)
            idf = math.log(1 + (N - df + 0.5) / (df + 0.5))
            score += idf * f * (k1 + 1) / (f + k1 * (1 - b + b * len(document) / mean))
        scores.append(score)
    return scores
