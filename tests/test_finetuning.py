"""Lesson 08 with deeper/sft_packing and deeper/dpo: masks and packing against one conversation at a time, DPO against trl, the
end token, exact resume, bad input. Values are computed another way than in the notebooks."""
import json
import math
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from exercise_cells import exercises, said

from minigpt import finetuning
from minigpt.engine.tokenizer import Tokenizer
from minigpt.deeper.packing import TokenFile, pack
from minigpt.chat_format import ChatRenderer
from minigpt.engine.dataset_readers import load_chats, load_text
from minigpt.deeper.dpo import answer_logprobs, dpo_loss, encode_pair, measure_pairs, pair_logprobs
from minigpt.deeper.sft_packing import best_fit, documents_apart
from minigpt.engine.finetune import add_chat_tokens, finetune, tuning_config
from minigpt.engine.packed_rows import PackedRows, encode_chats, held_rows
from minigpt.engine.preferences import PairRows, PairStepper, as_pair, check_dpo, dpo, load_pairs
from minigpt.engine.trainer import train
from minigpt.training import summed_loss
from minigpt.finetuning import measure, pad_chats, train_chats, usual_rate
from minigpt.engine.cache import KVCache
from minigpt.generation import generate
from minigpt.llama import Llama, LlamaConfig
from minigpt.gpt2 import GPT2, GPT2Config
from minigpt.engine.batches import Batches, Phase
from minigpt.engine.replies import reply_all
from minigpt.engine.ranks import Ranks
from minigpt.engine.stepper import Stepper
from minigpt.engine.train_config import TrainConfig

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
QUIET = {"progress": False}


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def chats():
    return [c for c in load_chats("chats") if sum(len(m["content"]) for m in c["messages"]) < 250]


@pytest.fixture(scope="module")
def tokenizer(chats):
    texts = [m["content"] for c in chats for m in c["messages"]]
    return Tokenizer.train(texts, 600, SPECIAL, progress=False)


@pytest.fixture(scope="module")
def renderer(tokenizer):
    return ChatRenderer(tokenizer)


def tiny(seed: int = 0, loud: float = 1.0, **changes) -> GPT2:
    torch.manual_seed(seed)
    shape = GPT2Config(vocab_size=600, block_size=128, n_layer=2, n_head=2, n_embd=32, bos_token_id=0, eos_token_id=0)
    model = GPT2(replace(shape, **changes))
    with torch.no_grad():
        model.wte.weight.mul_(loud)
    return model.eval()


def same(a: GPT2, b: GPT2) -> bool:
    return all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))


def short(chats, renderer, size=100):
    return [c for c in chats if len(renderer.render(c["messages"]).ids) <= size]


# ------------------------------------------------------------------ rows

def plain_best_fit(lengths, size):
    """The same rule, by looking at every open row."""
    rows, left = [], []
    for item in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        room, row = min(((left[r], -r) for r in range(len(rows)) if left[r] >= lengths[item]), default=(size, -len(rows)))
        if -row == len(rows):
            rows.append([])
            left.append(size)
        rows[-row].append(item)
        left[-row] -= lengths[item]
    return rows


@pytest.mark.parametrize("seed, size, most", [(0, 17, 17), (1, 257, 257), (2, 257, 40), (3, 64, 1)])
def test_best_fit_is_the_plain_rule(seed, size, most):
    lengths = np.random.default_rng(seed).integers(1, most + 1, 300).tolist()
    rows = best_fit(lengths, size)
    assert sorted(i for row in rows for i in row) == list(range(300))
    assert all(sum(lengths[i] for i in row) <= size for row in rows)
    assert len(rows) == len(plain_best_fit(lengths, size))
    assert len(rows) <= 11 / 9 * math.ceil(sum(lengths) / size) + 1


def test_packed_rows_hold_what_the_renderer_gives(chats, tokenizer, renderer, tmp_path):
    some = short(chats, renderer)[:80]
    packed = PackedRows(encode_chats(some, tokenizer, 129), 128, 0)
    rendered = {tuple(r.ids): r.mask for r in (renderer.render(c["messages"]) for c in some)}
    met = 0
    for number in range(packed.n_rows):
        ids, mask = (part.tolist() for part in packed.row(number))
        assert len(ids) == len(mask) == 129
        starts = [i for i, id in enumerate(ids) if id == 0] + [129]
        for a, b in zip(starts, starts[1:]):
            if b - a > 1:                                             # no filling
                assert mask[a:b] == rendered[tuple(ids[a:b])]
                met += 1
            else:
                assert mask[a] == 0
    assert met == len(some)
    file = pack(some, tmp_path / "t.tokens", tokenizer, masked=True, progress=False)   # the same from a token file
    again = PackedRows(TokenFile(file.path), 128, 0)
    assert all(np.array_equal(a, b) for n in range(packed.n_rows) for a, b in zip(packed.row(n), again.row(n)))


def test_an_epoch_reads_each_row_once_and_ranks_share_it(chats, tokenizer, renderer):
    tokens = encode_chats(short(chats, renderer)[:120], tokenizer, 129)
    config = TrainConfig(batch_size=4, seed=3)
    alone = PackedRows(tokens, 128, 0)
    alone.share(config, Ranks())
    pair = [PackedRows(tokens, 128, 0) for _ in range(2)]
    for rank, rows in enumerate(pair):
        rows.share(config, Ranks(rank, 2))
    drawn = [alone.draw().tolist() for _ in range(3 * alone.n_rows)]
    assert [sum((rows.draw().tolist() for rows in pair), []) for _ in range(len(drawn))] == drawn
    flat, n = sum(drawn, []), alone.n_rows
    for epoch in range(3):
        assert sorted(flat[epoch * n:(epoch + 1) * n]) == list(range(n))
    assert flat[:n] != flat[n:2 * n]


# ------------------------------------------------------------------ conversations kept apart

def test_packed_logits_are_those_of_each_conversation_alone(chats, tokenizer, renderer, ledger):
    model, packed = tiny(loud=20), PackedRows(encode_chats(short(chats, renderer)[:60], tokenizer, 129), 128, 0)
    worst = leak = 0.0
    for number in range(5):
        ids = torch.from_numpy(packed.row(number)[0])[:-1]
        with torch.no_grad(), documents_apart(model, 0):
            together = model(ids[None])[0]
        with torch.no_grad():
            leaking = model(ids[None])[0]
            for part in torch.tensor_split(torch.arange(128), torch.nonzero(ids == 0)[1:, 0]):
                alone = model(ids[None, part])[0]
                worst = max(worst, (together[part] - alone).abs().max().item())
                leak = max(leak, (leaking[part] - alone).abs().max().item())
    ledger("logits of packed conversations = each alone", worst, bound=1e-4)
    assert worst < 1e-4 and leak > 0.1


def test_packed_gradients_are_those_of_one_conversation_at_a_time(chats, tokenizer, renderer, ledger):
    some = short(chats, renderer)[:20]
    rows = PackedRows(encode_chats(some, tokenizer, 129), 128, 0)
    rows.share(TrainConfig(batch_size=rows.n_rows), Ranks())
    plain, total, count = tiny(loud=20), 0.0, 0
    for chat in some:                                                 # the obvious way, one at a time
        ids, mask = renderer.render(chat["messages"])
        logits = plain(torch.tensor([ids[:-1]]))[0]
        for t in range(len(ids) - 1):
            if mask[t + 1]:
                total, count = total - logits[t].log_softmax(-1)[ids[t + 1]], count + 1
    (total / count).backward()
    config = TrainConfig(batch_size=rows.n_rows, micro_batch=3)
    model = tiny(loud=20)
    ids, targets = Batches([Phase(rows, loss="answers")], config, 128).next(0.0)
    with documents_apart(model, 0):
        loss = Stepper(model, config).gradients(ids, targets)
    assert (targets != -100).sum() == count
    assert loss.item() == pytest.approx((total / count).item(), rel=1e-5)
    worst = max((p.grad - q.grad).abs().max().item() / q.grad.abs().max().item()
                for p, q in zip(model.parameters(), plain.parameters()))
    ledger("gradients of packed micro-batches = one conversation at a time (relative)", worst, bound=1e-3)
    assert worst < 1e-3


def test_the_hook_leaves_other_calls_alone_and_goes():
    model, ids = tiny(), torch.tensor([[0, 5, 6, 0, 7, 8]])
    before = model(ids)
    with documents_apart(model, 0):
        assert not torch.equal(model(ids), before)
        assert torch.allclose(model(ids, cache=KVCache(model.config)), before, atol=1e-6)
        assert generate(model, [0, 5], max_new_tokens=3, temperature=0).ids == \
            generate(tiny(), [0, 5], max_new_tokens=3, temperature=0).ids
    assert torch.equal(model(ids), before)
    with pytest.raises(ValueError, match="block_size"), documents_apart(model, 0):
        model(torch.arange(model.config.block_size + 1)[None] % 50)
    with pytest.raises(KeyError), documents_apart(model, 0):
        raise KeyError
    assert torch.equal(model(ids), before)


# ------------------------------------------------------------------ what is refused

def talk(*texts):
    return {"messages": [{"role": "assistant" if i % 2 else "user", "content": t} for i, t in enumerate(texts)]}


def test_bad_conversations_are_named(tokenizer):
    good, endless = talk("Hi", "Hello"), talk("Hi", "Hello", "And?", "word " * 300)
    with pytest.raises(ValueError, match="chats, row 1: no assistant message"):
        encode_chats([good, talk("Hi")], tokenizer, 129)
    with pytest.raises(ValueError, match=r"conversation 1 has \d+ tokens, the model reads 128 \(and 1 more such\).*'cut'"):
        encode_chats([good, endless, endless], tokenizer, 129)
    with pytest.raises(ValueError, match="too_long='shorten'"):
        encode_chats([good], tokenizer, 129, "shorten")
    with pytest.raises(ValueError, match="no conversation is left"):
        encode_chats([endless], tokenizer, 129, "drop")
    with pytest.raises(ValueError, match="no conversation is left"):
        encode_chats([], tokenizer, 129)
    kept = encode_chats([good], tokenizer, 129)
    assert np.array_equal(encode_chats([good, endless], tokenizer, 129, "drop").ids, kept.ids)
    assert np.array_equal(encode_chats([good, talk("Hi", "word " * 300)], tokenizer, 129, "cut").ids, kept.ids)
    cut = encode_chats([endless], tokenizer, 129, "cut")              # its first exchange fits
    assert np.array_equal(cut.ids, kept.ids) and np.array_equal(cut.mask, kept.mask)
    text = encode_chats([good, "word " * 300], tokenizer, 129, "cut")
    assert len(text) == len(kept) + 129 and text.mask[len(kept):].all()


def test_a_row_that_is_too_long_for_a_token_file_is_named(tokenizer, tmp_path):
    file = pack([talk("Hi", "Hello"), talk("Hi", "word " * 300)], tmp_path / "t.tokens", tokenizer, masked=True, progress=False)
    with pytest.raises(ValueError, match="conversation 1 has"):
        PackedRows(file, 128, 0)


def test_models_and_folders_that_cannot_work_are_refused_before_any_work(chats, tokenizer, tmp_path):
    started = []
    options = {"callbacks": [lambda row, model: started.append(row)], **QUIET}
    plain = Tokenizer.train(["some text without chats"] * 9, 262, ["<|endoftext|>"], progress=False)
    with pytest.raises(ValueError, match="no <|im_start|>, <|im_end|>"):
        finetune(tiny(vocab_size=262), chats, tokenizer=plain, **options)
    with pytest.raises(ValueError, match="600 ids, the model 700"):
        finetune(tiny(vocab_size=700), chats, tokenizer=tokenizer, **options)
    broken = tiny()
    with torch.no_grad():
        broken.blocks[1].mlp.c_fc.bias[3] = math.inf
    with pytest.raises(ValueError, match="blocks.1.mlp.c_fc.bias holds values"):
        finetune(broken, chats, tokenizer=tokenizer, **options)
    with pytest.raises(TypeError, match="one dict"):
        finetune(tiny(), chats[0], tokenizer=tokenizer, **options)
    with pytest.raises(ValueError, match="reads at most 128"):
        finetune(tiny(), chats[:9], tokenizer=tokenizer, config={"block_size": 256}, **options)
    with pytest.raises(FileNotFoundError, match="nowhere.jsonl"):
        finetune(tiny(), "nowhere.jsonl", tokenizer=tokenizer, **options)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "mine.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="another folder"):
        finetune(tiny(), chats, tokenizer=tokenizer, out=tmp_path, **options)
    with pytest.raises(FileExistsError, match="another folder"):
        dpo(tiny(), tokenizer=tokenizer, out=tmp_path, **options)
    assert not started and (tmp_path / "model" / "mine.txt").read_text() == "mine"


def test_a_loss_that_is_no_number_ends_the_run(chats, tokenizer, renderer):
    with pytest.raises(FloatingPointError, match="Try a lower learning rate"):
        finetune(tiny(), short(chats, renderer)[:30], tokenizer=tokenizer, **QUIET,
                 config={"lr": 1e20, "max_steps": 30, "warmup_steps": 0, "log_every": 1, "clip": 1e9})


# ------------------------------------------------------------------ the run

def test_the_end_is_learned_where_it_counts_and_only_there(chats, tokenizer, renderer, ledger):
    some, held = short(chats, renderer)[:300], short(load_chats("held"), renderer, 64)[:60]
    settings = {"max_steps": 60, "lr": 1e-2, "batch_size": 4, "block_size": 128}
    result = finetune(tiny(n_embd=48), some, tokenizer=tokenizer, held=held, config=settings, **QUIET)
    assert result.before["stops"] < 0.05
    assert result.after["stops"] >= 0.95
    assert result.after["answers_perplexity"] < result.before["answers_perplexity"] / 3
    ledger("answers that end by themselves after tuning (share of held-out prompts)", result.after["stops"], bound=0.95)
    deaf = encode_chats(some, tokenizer, 129)                         # the same run, but the end does not count
    mask = np.where(deaf.ids == renderer.im_end, 0, deaf.mask).astype(np.uint8)
    rows = PackedRows(replace(deaf, mask=mask), 128, 0)
    config = tuning_config(rows.n_rows, 1, 1e-3, settings)
    rows.share(config, Ranks())
    model = tiny(n_embd=48)
    with documents_apart(model, 0):
        train(model, Phase(rows, loss="answers"), config, progress=False)
    assert sum(r.finish_reason == "stop" for r in reply_all(model, renderer, held)) < 0.05 * len(held)


def test_interrupted_and_resumed_is_uninterrupted(chats, tokenizer, renderer, tmp_path, ledger):
    def interrupt(row, model):
        if row["step"] == 7:
            signal.raise_signal(signal.SIGINT)
    some = short(chats, renderer)[:60]
    options = {"tokenizer": tokenizer, "config": {"max_steps": 12, "batch_size": 2, "log_every": 1}, **QUIET}
    whole = finetune(tiny(), some, **options)
    half = finetune(tiny(), some, out=tmp_path / "run", callbacks=[interrupt], **options)
    assert (half.stopped, half.step) == ("SIGINT", 8) and not same(half.model, whole.model)
    rest = finetune(tiny(), some, out=tmp_path / "run", resume=True, **options)
    assert rest.step == 12 and same(rest.model, whole.model)
    ledger("fine-tuning resumed = uninterrupted (tensors that differ)", 0, bound=0)
    saved = GPT2.from_pretrained(tmp_path / "run" / "model")
    assert same(saved, whole.model)
    assert Tokenizer.from_pretrained(tmp_path / "run" / "model").encode("Hi") == tokenizer.encode("Hi")
    with pytest.raises(ValueError, match="rows=|same data"):
        finetune(tiny(), some[:20], out=tmp_path / "run", resume="force", **options)


def test_measures_are_those_of_a_plain_loop(chats, tokenizer, renderer):
    model, some = tiny(loud=20), short(chats, renderer, 60)[:12]
    nats, count, right, stops = 0.0, 0, 0, 0
    for chat in some:
        ids, mask = renderer.render(chat["messages"])
        logp = model(torch.tensor([ids]))[0].log_softmax(-1)
        for t in range(1, len(ids)):
            if mask[t]:
                nats, count = nats - logp[t - 1, ids[t]].item(), count + 1
                right += int(logp[t - 1].argmax()) == ids[t]
        row, said = renderer.prompt(chat["messages"][:-1]), []
        while len(said) < 20 and renderer.im_end not in said:         # greedy, by hand
            said.append(int(model(torch.tensor([row + said]))[0, -1].argmax()))
        stops += said[-1] == renderer.im_end and renderer.endoftext not in said and bool(tokenizer.decode(said[:-1]).strip())
    found = measure(model, renderer, some, max_new_tokens=20)
    assert found["answers_perplexity"] == pytest.approx(math.exp(nats / count), rel=1e-4)
    assert found["first_guesses"] == pytest.approx(right / count)
    assert found["stops"] == pytest.approx(stops / len(some))


def test_a_question_that_does_not_fit_gets_no_reply_and_ends_nothing(renderer):
    asked = [{"messages": [{"role": "user", "content": text}]} for text in ("Hi!", "so " * 200, "What is a dog?")]
    with pytest.warns(UserWarning, match="1 of 3 conversations"):
        found = reply_all(tiny(loud=20), renderer, asked, max_new_tokens=20)
    assert (found[1].ids, found[1].finish_reason) == ([], "length")
    assert [found[0], found[2]] == reply_all(tiny(loud=20), renderer, asked[::2], max_new_tokens=20)


def test_the_logged_loss_of_held_answers_is_that_of_whole_conversations(chats, tokenizer, renderer):
    """Windows of the loop begin where conversations do: nothing is asked that was said before the window."""
    held = short(chats[:60], renderer)
    result = finetune(tiny(), chats[60:70], tokenizer=tokenizer, held=held, too_long="drop", **QUIET, config={
        "max_steps": 2, "batch_size": 2, "block_size": 100, "eval_every": 1, "log_every": 1})
    nats = count = 0
    for chat in held:
        ids, mask = renderer.render(chat["messages"])
        with torch.no_grad():
            logprobs = result.model(torch.tensor([ids[:-1]]))[0].log_softmax(-1)
        nats -= sum(float(logprobs[t, ids[t + 1]]) for t in range(len(ids) - 1) if mask[t + 1])
        count += sum(mask)
    assert math.isclose(result.history[-1]["held_answers"], nats / count, rel_tol=1e-5)


def test_held_rows_keep_whole_conversations_and_their_windows(chats, tokenizer, renderer):
    held = short(chats[:60], renderer)
    stream = held_rows(held, tokenizer, 100, limit=64)
    assert (len(stream) - 1) % 100 == 0 and stream.mask.sum() == sum(sum(renderer.render(c["messages"]).mask) for c in held)
    starts = np.arange(0, len(stream), 100)
    assert (stream.ids[starts] == renderer.endoftext).all()
    assert len(held_rows(held, tokenizer, 100, limit=10, world=4)) == 8 * 100 + 1
    flat = encode_chats(held, tokenizer, None)
    assert held_rows(held, tokenizer, 5, limit=64).ids.tolist() == flat.ids.tolist()          # none fits
    one = min(held, key=lambda c: len(renderer.render(c["messages"]).ids))
    size = len(renderer.render(one["messages"]).ids)
    assert held_rows(held, tokenizer, size, limit=64).mask.sum() % sum(renderer.render(one["messages"]).mask) == 0


def test_more_tokens_change_nothing_for_the_old_ones():
    old, gpt2 = tiny(vocab_size=50257, loud=20), Tokenizer.from_pretrained("gpt2")
    model, tokenizer = add_chat_tokens(old, gpt2)
    text = "A text, and <|im_start|> is only text."
    assert tokenizer.encode_ordinary(text) == gpt2.encode(text)
    ids = torch.tensor([gpt2.encode(text)])
    assert torch.allclose(model(ids)[..., :50257], old(ids), atol=1e-4)
    assert torch.allclose(model.wte.weight[-1], old.wte.weight.mean(0), atol=1e-6)
    result = finetune(model, [talk("Hi", "Hello")] * 4, tokenizer=tokenizer, config={"max_steps": 2, "batch_size": 1}, **QUIET)
    assert math.isfinite(result.history[-1]["loss"])


@pytest.mark.parametrize("tied", [True, False])
def test_a_llama_gets_more_tokens_too(tied):
    gpt2 = Tokenizer.from_pretrained("gpt2")
    old = Llama(LlamaConfig(n_layer=1, n_head=2, n_embd=8, vocab_size=50257, tie_word_embeddings=tied)).eval()
    model, tokenizer = add_chat_tokens(old, gpt2)
    ids = torch.tensor([gpt2.encode("A text")])
    new = model(ids)
    assert type(model) is Llama and tokenizer.vocab_size == new.size(-1) == 50259
    assert torch.allclose(new[..., :50257], old(ids), atol=1e-5)
    assert torch.allclose(new[..., 50258], old(ids).mean(-1), atol=1e-5)        # the mean row gives the mean logit


# ------------------------------------------------------------------ preferences

def some_pairs(n: int = 8) -> list:
    return load_pairs(limit=n)


def test_dpo_loss_and_gradients_are_trls(tokenizer, renderer, tmp_path, ledger):
    trl, transformers = pytest.importorskip("trl"), pytest.importorskip("transformers")
    from datasets import Dataset
    rows = PairRows(some_pairs(4), renderer, 128)
    policy, frozen = tiny(loud=20), tiny(seed=1, loud=20)
    for name, model in (("policy", policy), ("frozen", frozen)):
        model.save_pretrained(tmp_path / name, tokenizer)
    theirs = [transformers.AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in ("policy", "frozen")]
    data = Dataset.from_list([{"prompt": "a", "chosen": "b", "rejected": "c"}])
    trainer = trl.DPOTrainer(
        model=theirs[0], ref_model=theirs[1], train_dataset=data,
        processing_class=transformers.AutoTokenizer.from_pretrained(tmp_path / "policy"),
        args=trl.DPOConfig(output_dir=str(tmp_path / "trl"), beta=0.3, report_to=[], use_cpu=True, bf16=False,
                           gradient_checkpointing=False))
    trainer.model.eval()
    ids, mask = (torch.from_numpy(part).transpose(0, 1).flatten(0, 1) for part in (rows.table, rows.marks))
    loss = trainer.compute_loss(trainer.model, {"input_ids": ids, "attention_mask": torch.ones_like(ids),
                                                "completion_mask": mask.long()})
    loss.backward()
    rows.drawn = np.arange(4)
    stepper = PairStepper(policy, TrainConfig(micro_batch=2), Ranks(), rows, pair_logprobs(frozen, rows.encoded), beta=0.3)
    windows = rows.windows(rows.drawn)
    ours = stepper.gradients(windows.x, np.where(windows.mask, windows.y, -100))
    ledger("DPO loss = trl's", abs(ours.item() - loss.item()), peer="trl", bound=1e-5)
    assert ours.item() == pytest.approx(loss.item(), abs=1e-5)
    assert abs(ours.item() - math.log(2)) > 0.1                       # not at the start, where all are equal
    want, got = theirs[0].transformer.wte.weight.grad, policy.wte.weight.grad
    worst = ((want - got).abs().max() / want.abs().max()).item()
    ledger("DPO gradient = trl's (relative)", worst, peer="trl", bound=1e-4)
    assert worst < 1e-4


def test_dpo_loss_is_equation_7_in_64_bits(renderer, ledger):
    rows = PairRows(some_pairs(5), renderer, 128)
    policy, frozen = tiny(loud=20).double(), tiny(seed=1, loud=20).double()
    want = []
    for chosen, rejected in zip(rows.table[:, 0], rows.table[:, 1]):
        odds = 0.0
        for sign, ids in ((1, chosen), (-1, rejected)):
            answer = max(i for i in range(len(ids)) if ids[i] == renderer.header["assistant"][0]) + \
                len(renderer.header["assistant"])
            end = [i for i in range(answer, len(ids)) if ids[i] == renderer.im_end][0]
            for model, side in ((policy, 1), (frozen, -1)):
                logp = model(torch.from_numpy(ids)[None])[0].log_softmax(-1)
                odds += sign * side * sum(logp[t - 1, ids[t]].item() for t in range(answer, end + 1))
        want.append(math.log1p(math.exp(-0.3 * odds)))
    windows = rows.windows([0, 1, 2, 3, 4])
    x, y = torch.from_numpy(windows.x), torch.from_numpy(np.where(windows.mask, windows.y, -100))
    logprobs = [answer_logprobs(m.float(), x, y).view(-1, 2) for m in (policy, frozen)]
    got = dpo_loss(*logprobs, beta=0.3)
    worst = (got.double() - torch.tensor(want, dtype=torch.double)).abs().max().item()
    ledger("DPO loss = equation 7 in 64 bits", worst, bound=1e-4)
    assert worst < 1e-4


def test_dpo_prefers_and_resumes_exactly(tokenizer, tmp_path):
    def interrupt(row, model):
        if row["step"] == 5:
            signal.raise_signal(signal.SIGINT)
    pairs = some_pairs(16)
    options = {"tokenizer": tokenizer, "held": pairs[:4], "beta": 0.5, **QUIET,
               "config": {"max_steps": 14, "batch_size": 8, "lr": 3e-3, "log_every": 1}}
    whole = dpo(tiny(loud=5), pairs, **options)
    assert whole.before["loss"] == pytest.approx(math.log(2), abs=1e-6) and whole.before["prefers"] == 0.5
    assert whole.after["loss"] < 0.5 and whole.after["prefers"] == 1
    assert whole.after["chosen"] - whole.after["rejected"] > 1
    half = dpo(tiny(loud=5), pairs, out=tmp_path / "run", callbacks=[interrupt], **options)
    assert half.step == 6 and half.after == {}            # the step that was under way is ended
    rest = dpo(tiny(loud=5), pairs, out=tmp_path / "run", resume=True, **options)
    assert rest.step == 14 and same(rest.model, whole.model)
    assert same(GPT2.from_pretrained(tmp_path / "run" / "model"), whole.model)


@pytest.mark.parametrize("row, words", [
    ({"prompt": "a", "chosen": "b"}, "no pair here"), ("text", "no pair here"),
    ({"prompt": "a", "chosen": "b", "rejected": "b"}, "nothing to prefer"),
    ({"prompt": "a", "chosen": "b", "rejected": None}, "rejected"), ({"prompt": 3, "chosen": "b", "rejected": "c"}, "chosen"),
    ({"prompt": "a", "chosen": [{"role": "user", "content": "b"}], "rejected": "c"}, "role is 'user'"),
    ({"chosen": talk("a", "b")["messages"], "rejected": talk("x", "c")["messages"]}, "same prompt")])
def test_bad_pairs_are_named(row, words):
    with pytest.raises(ValueError, match=f"pairs.jsonl, line 3.*{words}"):
        as_pair(row, "pairs.jsonl, line 3")


def test_layouts_of_pairs(tmp_path):
    want = as_pair({"prompt": "a", "chosen": "b", "rejected": "c"})
    assert want == as_pair({"chosen": talk("a", "b")["messages"], "rejected": talk("a", "c")["messages"]})
    assert want == as_pair({"prompt": talk("a")["messages"], "chosen": talk("", "b")["messages"][1:], "rejected": "c"})
    assert want == as_pair(want)
    path = tmp_path / "pairs.jsonl"
    path.write_text(json.dumps({"prompt": "a", "chosen": "b", "rejected": "c"}) + "\n")
    assert load_pairs(path) == [want]


def test_dpo_calls_what_a_generator_gives_at_every_logged_step(tokenizer):
    class Ends:
        rows, finished = 0, 0

        def __call__(self, row, model):
            self.rows += 1

        def finish(self):
            self.finished += 1
    ends = Ends()
    dpo(tiny(), some_pairs(), tokenizer=tokenizer, config={"max_steps": 3, "log_every": 1, "device": "cpu"},
        callbacks=(c for c in [ends]), progress=False)
    assert (ends.rows, ends.finished) == (3, 1)


def test_dpo_refuses_what_cannot_work(tokenizer, renderer):
    pairs = some_pairs(4)
    for changes, words in (({"beta": 0}, "beta=0"), ({"config": {"batch_size": 3}}, "batch_size=3"),
                           ({"config": {"micro_batch": 1}}, "micro_batch=1"), ({"config": {"block_size": 8}}, r"pair 2 has \d+ tokens, the model reads 8")):
        with pytest.raises(ValueError, match=words):
            dpo(tiny(), pairs, tokenizer=tokenizer, **{**QUIET, **changes})
    with pytest.raises(ValueError, match="no pairs"):
        dpo(tiny(), [], tokenizer=tokenizer, **QUIET)


@pytest.mark.parametrize("size, world, works", [(12, 4, 16), (16, 16, 32), (2, 2, 4), (7, 1, 8)])
def test_dpo_takes_whole_pairs_on_each_rank(renderer, size, world, works):
    """What does not divide is refused, with a batch_size that works; with that one, the ranks draw just its pairs."""
    with pytest.raises(ValueError, match=f"batch_size={size}, processes: {world}.* {2 * world}, such as {works}$"):
        check_dpo(TrainConfig(batch_size=size), 0.1, world)
    config, rows = TrainConfig(batch_size=works), PairRows(some_pairs(works // 2), renderer, 128)
    check_dpo(config, 0.1, world)
    drawn = []
    for rank in range(world):
        rows.position = 0
        rows.share(config, Ranks(rank, world), size=2)
        drawn += rows.draw().tolist()
    assert sorted(drawn) == list(range(works // 2))


# ------------------------------------------------------------------ several processes

RANKS = """
import json, sys
sys.path.insert(0, sys.argv[2])
import test_finetuning as here
import torch.distributed as dist
from minigpt.engine.tokenizer import Tokenizer
tokenizer, found = Tokenizer.from_pretrained(f"{sys.argv[1]}/tokenizer"), {}
for kind in ("ddp", "fsdp"):
    for tune in (here.tune_chats, here.tune_pairs):
        result = tune(tokenizer, kind, f"{sys.argv[1]}/{kind} {tune.__name__}")
        assert any(hasattr(p, "full_tensor") for p in result.model.parameters()) == (kind == "fsdp")
        found[f"{kind} {tune.__name__}"] = [result.before, result.after]
told = [None, None]
dist.all_gather_object(told, found)
assert told[0] == told[1]
if dist.get_rank() == 0:
    with open(f"{sys.argv[1]}/found.json", "w") as file:
        json.dump(found, file)
"""
FEW = {"max_steps": 4, "batch_size": 4, "lr": 1e-3, "log_every": 1, "device": "cpu"}


def tune_chats(tokenizer, kind, out):
    rows = [talk(f"Is {n} a number?", f"Yes, {n} is.") for n in range(20)]
    return finetune(tiny(loud=5), rows[:16], tokenizer=tokenizer, held=rows[16:], texts=["One and two are three."], out=out,
                    config=FEW | {"parallel": kind}, **QUIET)


def tune_pairs(tokenizer, kind, out):
    return dpo(tiny(loud=5), some_pairs(8), tokenizer=tokenizer, held=some_pairs(3), out=out,
               config=FEW | {"parallel": kind}, **QUIET)


@pytest.mark.skipif(not hasattr(torch.cpu.Stream, "record_event"), reason="this torch runs no FSDP2 on a CPU (2.6 does not)")
def test_two_processes_measure_and_save_what_one_does(tokenizer, tmp_path):
    """DDP and FSDP2 over gloo: both ranks are told the same numbers, before and after, and the whole model is saved."""
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    script = tmp_path / "script.py"
    script.write_text(RANKS, encoding="utf-8")
    here = Path(__file__).resolve().parent
    env = os.environ | {"PYTHONPATH": str(here.parent), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
                           str(script), str(tmp_path), str(here)], env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads((tmp_path / "found.json").read_text())
    assert len(found) == 4
    for tune in (tune_chats, tune_pairs):
        one = tune(tokenizer, "ddp", tmp_path / f"one {tune.__name__}")
        assert one.after != one.before and len(one.after) == 4
        for kind in ("ddp", "fsdp"):
            before, after = found[f"{kind} {tune.__name__}"]
            assert before == pytest.approx(one.before, rel=1e-5) and after == pytest.approx(one.after, rel=1e-3)
            saved = GPT2.from_pretrained(tmp_path / f"{kind} {tune.__name__}" / "model")
            assert torch.allclose(saved.wte.weight, one.model.wte.weight, atol=1e-4)


def test_the_bundled_pairs_differ_by_a_question_at_the_end():
    pairs = load_pairs()
    assert len(pairs) >= 50
    for pair in pairs:
        assert pair.chosen.startswith(pair.rejected) and pair.chosen.endswith("?") and not pair.rejected.endswith("?")
    known = {m["content"].lower() for c in load_chats("held") for m in c["messages"] if m["role"] == "user"}
    assert not known & {p.prompt[-1]["content"].lower() for p in pairs}


def test_plain_texts_may_be_mixed_in(chats, tokenizer, renderer):
    texts = load_text("stories", limit=3)
    tokens = encode_chats([*short(chats, renderer)[:5], *texts], tokenizer, 129, "cut")
    assert (tokens.ids == 0).sum() == 8
    start = int(np.flatnonzero(tokens.ids == 0)[5])
    assert tokens.mask[start + 1:].all()


# ------------------------------------------------------------------ the lesson's own functions

def test_padded_targets_are_the_masks_of_each_row(chats, renderer):
    rows = [renderer.render(c["messages"]) for c in short(chats, renderer)[:5]]
    x, y = pad_chats(rows)
    assert x.shape == y.shape == (5, max(len(r.ids) for r in rows) - 1)
    for n, (ids, mask) in enumerate(rows):
        assert x[n, :len(ids) - 1].tolist() == ids[:len(x[n]) + 1][:-1]
        assert [int(t) for t in y[n] if t != -100] == [i for i, m in zip(ids, mask) if m]
        assert [t for t in range(y.shape[1]) if y[n, t] != -100] == [t - 1 for t, m in enumerate(mask) if m]


def test_the_loop_on_one_screen_is_the_engines(chats, renderer):
    """Its first loss by hand; the same seed gives the same weights, another one does not."""
    rows = [renderer.render(c["messages"]) for c in short(chats, renderer)[:3]]
    model, nats, count = tiny(loud=20), 0.0, 0
    for ids, mask in rows:
        with torch.no_grad():
            logp = model(torch.tensor([ids]))[0].log_softmax(-1)
        nats -= sum(logp[t - 1, ids[t]].item() for t in range(1, len(ids)) if mask[t])
        count += sum(mask)
    losses = train_chats(model, rows, max_steps=6, lr=1e-3, batch_size=3)
    assert losses[0] == pytest.approx(nats / count, rel=1e-4) and losses[-1] < losses[0] and not model.training
    again, other = tiny(loud=20), tiny(loud=20)
    train_chats(again, rows, max_steps=6, lr=1e-3, batch_size=3)
    train_chats(other, rows, max_steps=6, lr=1e-3, batch_size=2, seed=1)
    assert same(model, again) and not same(model, other)


def test_the_default_rate_is_the_advised_one(chats, tokenizer, renderer):
    model = tiny()
    rate = usual_rate(model)
    assert rate == pytest.approx(0.6 / math.sqrt(sum(p.numel() for p in model.parameters())))
    assert 1e-5 < usual_rate(torch.nn.Linear(124_000_000, 1, bias=False, device="meta")) < 1e-4
    some = short(chats, renderer)[:12]
    settings = {"max_steps": 4, "batch_size": 2, "log_every": 1, "warmup_steps": 0}
    result = finetune(model, some, tokenizer=tokenizer, config=settings, **QUIET)
    assert result.history[0]["lr"] == pytest.approx(rate)
    result = dpo(tiny(), some_pairs(4), tokenizer=tokenizer, config=settings, **QUIET)
    assert result.history[0]["lr"] == pytest.approx(rate / 2)


@pytest.mark.parametrize("epochs", [0, -1, math.inf, math.nan])
def test_epochs_that_make_no_run_are_refused(chats, tokenizer, epochs):
    for tune, data in ((finetune, chats[:9]), (dpo, some_pairs(4))):
        with pytest.raises(ValueError, match=f"epochs={epochs}"):
            tune(tiny(), data, tokenizer=tokenizer, epochs=epochs, **QUIET, **({"too_long": "drop"} if tune is finetune else {}))


def test_rows_are_as_long_as_the_longest_conversation(tokenizer, renderer):
    result = finetune(tiny(), [talk("Hi", "Hello"), talk("Hi", "Hello " * 9)], tokenizer=tokenizer, **QUIET,
                      config={"max_steps": 1, "batch_size": 1, "log_every": 1})
    size = len(renderer.render(talk("Hi", "Hello " * 9)["messages"]).ids)
    assert result.history[0]["tokens"] == size - 1


def test_finetune_takes_a_loss(chats, tokenizer, renderer):
    """It is called in summed_loss's place: with half of it, the logged loss is half."""
    def half(*args):
        return 0.5 * summed_loss(*args)
    options = {"tokenizer": tokenizer, "config": {"max_steps": 1, "batch_size": 2, "log_every": 1}, **QUIET}
    some = short(chats, renderer)[:10]
    whole, less = finetune(tiny(), some, **options), finetune(tiny(), some, loss=half, **options)
    assert less.history[0]["loss"] == pytest.approx(whole.history[0]["loss"] / 2, rel=1e-6)


def test_an_end_that_is_no_answers_end_is_not_counted(renderer):
    """A model that always says one token: <|im_end|> at once is an empty answer, <|endoftext|> a text's end."""
    class Says(torch.nn.Module):
        def __init__(self, first, then):
            super().__init__()
            self.config, self.device, self.said = tiny().config, torch.device("cpu"), (first, then)
            self.weight = torch.nn.Parameter(torch.zeros(1))

        def decoder(self):
            return self

        def start(self, prompts, room):
            return self.logits(len(prompts), self.said[0])

        def feed(self, new, stay=None):
            return self.logits(len(new), self.said[1])

        def logits(self, rows, token):
            return torch.nn.functional.one_hot(torch.full((rows, 1), token), 600).float()
    word, asked = renderer.tokenizer.encode("a")[0], [talk("Hi", "Hello")] * 3
    share = {name: finetuning._stops(Says(*said), renderer, asked, 3, 8) for name, said in {
        "answer": (word, renderer.im_end), "empty": (renderer.im_end, word), "text": (renderer.endoftext, renderer.im_end),
        "endless": (word, word)}.items()}
    assert share == {"answer": 1.0, "empty": 0.0, "text": 0.0, "endless": 0.0}


def test_shared_words_of_a_pair_cancel(renderer):
    """Where one answer is the beginning of the other, its words stand in both sums and drop out of loss and gradient."""
    pair = encode_pair(some_pairs(1)[0], renderer)
    (ids, mask), (other, less) = pair
    n = sum(less) - 1                                                 # without its end
    begin = mask.index(1)
    assert other[:begin + n] == ids[:begin + n]
    own = [(ids, [0] * (begin + n) + mask[begin + n:]), (other, [0] * (begin + n) + less[begin + n:])]
    model, frozen = tiny(loud=20), tiny(seed=1, loud=20)
    grads = []
    for rows in (pair, own):
        model.zero_grad()
        policy, reference = (answer_logprobs(m, *pad_chats(rows)).view(1, 2) for m in (model, frozen))
        dpo_loss(policy, reference.detach(), beta=0.3).sum().backward()
        grads.append(model.wte.weight.grad.clone())
    assert torch.allclose(*grads, atol=1e-5 * grads[0].abs().max().item())


def test_ties_are_half_a_preference(renderer):
    model, pairs = tiny(), [encode_pair(p, renderer) for p in some_pairs(3)]
    found = measure_pairs(model, pairs, pair_logprobs(model, pairs))
    assert (found["prefers"], found["chosen"], found["rejected"]) == (0.5, 0, 0)


@pytest.mark.parametrize("name, number", [("deeper/sft_packing", 0), ("deeper/sft_packing", 1), ("deeper/dpo", 0), ("deeper/dpo", 2)])
def test_exercises(name, number, capsys):
    """Those that need no trained model."""
    _, empty, check, solution = exercises(name)[number]
    space = {"torch": torch, "F": torch.nn.functional, "dpo_loss": dpo_loss, "policy": torch.tensor([[-10.0, -21.0], [-5.0, -5.0]]),
             "frozen": torch.tensor([[-12.0, -20.0], [-5.0, -5.0]])}
    assert said(empty, check, space, capsys) == "not solved yet"
    assert said(solution, check, space, capsys) == "correct"
