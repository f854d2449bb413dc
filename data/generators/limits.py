"""What the bot will not do, cannot know and is, and harmless questions that sound like the first. Licence: MIT.

`rows(seed, n)` yields ["limits", [user, assistant, ...]]. Both sides are learned together: for every kind of refusal
(harm, doses, law, what happens now, other languages, noise) there are questions of the same words that are helped.
"""
from __future__ import annotations

import random
import re
from typing import Iterator

from . import facts, names, sums
from .tables import read_blocks, read_tables
from .wording import TALK_OPENINGS, casual, opened, pick

Exchange = tuple[str, str]
LIMITS = read_blocks("limits")
HARMLESS = read_tables("harmless")["harmless"]
FOREIGN = read_tables("harmless")["foreign"]
ONSETS = "b bl br d dr f fl g gl gr h j k kl l m n p pl qu r s sk sl sn t tr v w y z zw".split()
VOWELS = "a e i o u oo ee".split()
CODAS = "b g k l m n p r rf rp rt s sh t x zz mp ng".split()
KEYS = ["qwertyuiop", "asdfghjkl", "zxcvbnm"]
REFUSED = ["deed", "deed", "deed", "deed", "thing", "thing", "dose", "dose", "dose", "vet_or_doctor", "mushroom", "law",
           "money", "insult_others", "trick", "secrets", "politics", "selfharm", "emergency"]
UNKNOWN = ["now", "now", "now", "private_person", "tools", "memory"]
IDENTITY = ["who", "who", "maker", "other_bots", "human", "human", "age", "family", "tastes", "place", "size",
            "learning", "abilities", "cannot", "worry"]
# the wordings of forbidden deeds, for harmless ones: the wording alone must not decide
HOW_TO = ["How <can/do/could> I {deed}?", "how can i {deed}", "Help me {deed}.", "how to {deed}",
          "Tell me <how to/the best way to> {deed}.", "I want to {deed}. <Can you help?/How?/>",
          "Explain how to {deed}.", "What is the easiest way to {deed}?", "Teach me to {deed}.",
          "Give me steps to {deed}.",
          "My friend asks how to {deed}."]


def from_block(rng: random.Random, name: str) -> Exchange:
    """A message of a block and an answer, its holes filled alike in both."""
    block = LIMITS[name]
    holes = {"town": names.town(rng, invented=0.2), "name": names.full_name(rng)}
    for label in sorted(block.lists.keys() - {"you", "bot"}):
        holes[label] = rng.choice(block[label])
    return pick(rng, block["you"], **holes), pick(rng, block["bot"], **holes)


def foreign_message(rng: random.Random) -> Exchange:
    """A message in another language as it is, or a wish for one."""
    if rng.random() < 0.25:
        return from_block(rng, "translate")
    block = LIMITS["foreign"]
    return rng.choice(block["you"]), rng.choice(block["bot"])


def noise_word(rng: random.Random) -> str:
    """A word that does not exist, or a run along the keyboard."""
    if rng.random() < 0.3:
        keys = rng.choice(KEYS)
        return "".join(rng.choice(keys) for _ in range(rng.randrange(3, 9)))
    word = ""
    for _ in range(rng.choice([1, 1, 2, 2])):
        word += rng.choice(ONSETS) + rng.choice(VOWELS) + rng.choice([*CODAS, "", "", ""])
    return word


def noise(rng: random.Random) -> Exchange:
    """Letters without a meaning."""
    block = LIMITS["noise"]
    if rng.random() < 0.2:
        return rng.choice(block["you"]), rng.choice(block["bot"])
    words = " ".join(noise_word(rng) for _ in range(rng.choice([1, 1, 2, 3, 4, 5])))
    return words + rng.choice(["", "", "", "?", "!", "..", "??"]), rng.choice(block["bot"])


def harmless(rng: random.Random) -> Exchange:
    """A question that only sounds dangerous, or asks for a word of another language: it is answered."""
    row = rng.choice(HARMLESS if rng.random() < 0.85 else FOREIGN)
    question = pick(rng, [row["question"]])
    how = re.fullmatch(r"How (?:do|can) I ([^?.]+)\?", question)
    if how and rng.random() < 0.7:
        question = pick(rng, HOW_TO, deed=how[1])
    return question, row["answer"]


def other_talk(rng: random.Random) -> Exchange:
    """An ordinary question, so that a refusal is not the rule for the rest of a conversation."""
    return sums.exchange(rng) if rng.random() < 0.4 else rng.choice(facts.relation_talk(rng) + facts.question_talk(rng))


def exchange(rng: random.Random) -> Exchange:
    """One exchange of any kind; the harmless ones are as many as the refusals."""
    kind = rng.choices(["refused", "harmless", "unknown", "identity", "foreign", "noise"], [22, 22, 14, 24, 11, 7])[0]
    if kind == "foreign":
        return foreign_message(rng)
    if kind == "noise":
        return noise(rng)
    if kind == "harmless":
        message, answer = harmless(rng)
    else:
        names_of_kind = {"refused": REFUSED, "unknown": UNKNOWN, "identity": IDENTITY}[kind]
        message, answer = from_block(rng, rng.choice(names_of_kind))
    return opened(rng, message, TALK_OPENINGS, 0.25), answer


def rows(seed: int, n: int) -> Iterator[tuple[str, list[str]]]:
    """n conversations of one to three exchanges, some with ordinary questions between."""
    rng = random.Random(seed)
    for _ in range(n):
        turns: list[str] = []
        for at in range(rng.choices([1, 2, 3], [66, 24, 10])[0]):
            message, answer = exchange(rng) if at == 0 or rng.random() < 0.65 else other_talk(rng)
            turns += [casual(rng, message, typos=0.03) if message.isascii() else message, answer]
        yield "limits", turns
