"""Conversations of two to six exchanges in which something has to be remembered. Licence: MIT.

`rows(seed, n)` yields ["recall", [user, assistant, ...]]: facts that the user tells and asks for later, with other talk
between; corrections ("no, I meant Tuesday"); lists; what the assistant said itself; what was never told, where the
right answer is that it was not told. `Chat` notes for each asked turn what has to come back.
"""
from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import Callable, Iterator

from . import facts, names, sums, talk
from .tables import Block, read_blocks
from .values import different_values, value
from .wording import casual, fill, join_list, number_word, pick

FACTS = read_blocks("recall")
TURNS = read_blocks("turns")
OWN_WORDS = [block for block in TURNS.values() if "again" in block.lists]
QUESTION_FREE = {"word", "code", "number", "kids", "room", "seat"}      # asked in vain, these would sound odd
GROUPS = {"town": "home", "origin": "home", "pet_kind": "pet", "animal": "pet", "boat": "pet", "weekend": "trip",
          "trip_day": "trip", "with": "trip", "seat": "trip", "meeting": "trip", "dentist": "trip", "lunch": "food",
          "friend_likes": "food", "sport": "play", "instrument": "play", "learning": "play", "school": "play",
          "hobby": "play", "train": "time", "wake": "time", "put": "place", "lost": "place", "room": "place"}


@dataclass
class Chat:
    """A conversation as it grows. expected: number of the assistant's turn -> what it has to hold, None: not told."""

    turns: list[str] = field(default_factory=list)
    expected: dict[int, str | None] = field(default_factory=dict)

    def add(self, user: str, assistant: str, *, holds: str | None = "", asked: bool = False) -> None:
        """One exchange; asked: it is a question for something said before, and `holds` has to come back."""
        self.turns += [user, assistant]
        if asked:
            self.expected[len(self.turns) - 1] = holds


@dataclass(frozen=True)
class Told:
    """A fact of recall.txt with its values."""

    block: Block
    x: str
    k: str

    def wording(self, rng: random.Random, label: str, **more: str) -> str:
        """One wording of the block with the fact's values, or others in their place."""
        return pick(rng, self.block[label], **{"x": self.x, "k": self.k, **more})


def new_fact(rng: random.Random, block: Block) -> Told:
    """A fact with values of its kind."""
    kind = block.settings.get("k", "")
    second = "" if not kind else rng.choice(block["kinds"]) if kind == "own" else value(rng, kind)
    return Told(block, new_value(rng, block, second), second)


def new_value(rng: random.Random, block: Block, other: str) -> str:
    """A value of a block's kind that is not the other one."""
    kind = block.settings["value"]
    for _ in range(20):
        found = rng.choice(block["values"]) if kind == "own" else value(rng, kind)
        if found.lower() not in other.lower() and other.lower() not in found.lower() or not other:
            return found
    raise ValueError(f"[{block.name}] has no value besides {other!r}")


def new_facts(rng: random.Random, count: int) -> list[Told]:
    """Facts of different kinds, now and then two of one kind that differ in whom they are about."""
    blocks = rng.sample(list(FACTS.values()), count)
    found = [new_fact(rng, block) for block in blocks]
    twice = [one for one in found if one.block.name.startswith("relative")]
    if twice and count > 1:
        twin = new_fact(rng, twice[0].block)
        if twin.k != twice[0].k and twin.x.lower() != twice[0].x.lower():
            found[-1 if found[0] is twice[0] else 0] = twin
    return found


def reply_to(rng: random.Random, told: Told) -> str:
    """What the assistant says to a fact."""
    if rng.random() < 0.5:
        return rng.choice(TURNS["reply"]["general"])
    return told.wording(rng, "ok")


def tell(rng: random.Random, chat: Chat, told: Told) -> None:
    """The user tells a fact."""
    chat.add(told.wording(rng, "say"), reply_to(rng, told))


def tell_together(rng: random.Random, chat: Chat, some: list[Told]) -> None:
    """The user tells several facts in one message."""
    sentences = [told.wording(rng, "say") for told in some]
    ended = [sentence if sentence[-1] in ".!?" else sentence + "." for sentence in sentences]
    chat.add(" ".join(ended), rng.choice(TURNS["reply"]["general"]))


def interlude(rng: random.Random, chat: Chat, count: int) -> None:
    """Other talk: facts, sums and small talk that has nothing to do with the user."""
    for _ in range(count):
        maker: Callable = rng.choice([sums.exchange, lambda r: rng.choice(facts.question_talk(r)), talk.filler,
                                      talk.filler, lambda r: facts.relation_talk(r)[0]])
        question, answer = maker(rng)
        chat.add(casual(rng, question), answer)


def ask(rng: random.Random, chat: Chat, told: Told) -> None:
    """The user asks for a fact; now and then as a yes/no question, right or wrong."""
    if told.block.get("check") and rng.random() < 0.15:
        answer = told.wording(rng, "tell")
        low = lower_your(answer)
        right = rng.random() < 0.5
        asked = told.x if right else new_value(rng, told.block, told.x)
        reply = pick(rng, TURNS["reply"]["yes" if right else "no"], low=low, tell=answer)
        chat.add(casual(rng, told.wording(rng, "check", x=asked), typos=0), reply, holds=told.x, asked=True)
        return
    chat.add(casual(rng, told.wording(rng, "ask"), typos=0.01), told.wording(rng, "tell"), holds=told.x, asked=True)


def lower_your(answer: str) -> str:
    """An answer with a small "you" at its beginning, for use behind "Yes,"."""
    return answer[0].lower() + answer[1:] if answer.startswith(("You", "It ")) else answer


def ask_untold(rng: random.Random, chat: Chat, told: list[Told]) -> None:
    """The user asks for something that was never said; the assistant says so."""
    blocks = [block for block in FACTS.values() if block.name not in QUESTION_FREE]
    known = {(one.block.name, one.k) for one in told}
    while True:
        missing = new_fact(rng, rng.choice(blocks))
        same_kind = [one for one in told if one.block.name == missing.block.name]
        overlap = any(name_of(one) == name_of(missing) for one in told)
        if (missing.block.name, missing.k) not in known and not overlap and (missing.k or not same_kind):
            break
    what = fill(rng, missing.block["what"][0], k=missing.k)
    answer = pick(rng, TURNS["reply"]["not_told"], what=what[0].lower() + what[1:])
    chat.add(casual(rng, missing.wording(rng, "ask"), typos=0.01), answer, holds=None, asked=True)


def name_of(told: Told) -> str:
    """What a fact is about, roughly: two facts of one group would answer each other's questions."""
    return GROUPS.get(told.block.name, told.block.name.split("_")[0])


def facts_chat(rng: random.Random) -> Chat:
    """One to three facts, other talk, and questions."""
    chat = Chat()
    some = new_facts(rng, rng.choices([1, 2, 3], [45, 35, 20])[0])
    if len(some) > 1 and rng.random() < 0.4:
        tell_together(rng, chat, some)
    else:
        for told in some:
            tell(rng, chat, told)
            interlude(rng, chat, rng.choices([0, 1], [70, 30])[0])
    weights = [40, 30, 20, 10] if len(some) == 1 else [60, 40, 0, 0]
    interlude(rng, chat, rng.choices([0, 1, 2, 3], weights)[0])
    asked = rng.sample(some, min(len(some), rng.choices([1, 2], [65, 35])[0]))
    for told in asked:
        ask(rng, chat, told)
    if rng.random() < 0.15:
        ask_untold(rng, chat, some)
    if rng.random() < 0.1:
        chat.add(rng.choice(TURNS["reply"]["thanks"]), rng.choice(TURNS["reply"]["welcome"]))
    return chat


def corrected_chat(rng: random.Random) -> Chat:
    """A fact, its correction, other talk, and the question: the new value counts."""
    chat = Chat()
    told = new_fact(rng, rng.choice(list(FACTS.values())))
    tell(rng, chat, told)
    interlude(rng, chat, rng.choices([0, 1], [70, 30])[0])
    new = new_value(rng, told.block, told.x)
    values = {"x": told.x, "y": new}
    chat.add(pick(rng, TURNS["reply"]["correct"], **values), pick(rng, TURNS["reply"]["corrected"], **values))
    interlude(rng, chat, rng.choices([0, 1, 2], [50, 35, 15])[0])
    ask(rng, chat, Told(told.block, new, told.k))
    return chat


def untold_chat(rng: random.Random) -> Chat:
    """A question for what was never told, after other facts and talk, or at once."""
    chat = Chat()
    some = new_facts(rng, rng.choices([0, 1, 2], [30, 50, 20])[0])
    for told in some:
        tell(rng, chat, told)
    interlude(rng, chat, rng.choices([0, 1, 2], [55, 30, 15])[0])
    ask_untold(rng, chat, some)
    if some and rng.random() < 0.4:
        ask(rng, chat, rng.choice(some))
    return chat


def list_chat(rng: random.Random) -> Chat:
    """A list, perhaps with something added or taken off, and a question about it."""
    chat, block = Chat(), TURNS["list"]
    things = rng.sample(names.entries("groceries"), rng.randrange(2, 5))
    listed = {"l": join_list(things), "n": number_word(len(things))}
    chat.add(pick(rng, block["say"], **listed), pick(rng, block["ok"], **listed))
    interlude(rng, chat, rng.choices([0, 1], [65, 35])[0])
    if rng.random() < 0.35:
        new = rng.choice([thing for thing in names.entries("groceries") if thing not in things])
        things.append(new)
        chat.add(pick(rng, block["add"], t=new), pick(rng, block["added"], t=new))
    elif len(things) > 2 and rng.random() < 0.25:
        gone = rng.choice(things)
        things.remove(gone)
        chat.add(pick(rng, block["take"], t=gone), pick(rng, block["taken"], t=gone))
    interlude(rng, chat, rng.choices([0, 1, 2], [50, 35, 15])[0])
    ask_list(rng, chat, things)
    return chat


def ask_list(rng: random.Random, chat: Chat, things: list[str]) -> None:
    """A question about a list: all of it, one place, whether a thing is on it, how many they are."""
    block, listed = TURNS["list"], join_list(things)
    kind = rng.choices(["all", "first", "last", "second", "has", "how_many"], [45, 12, 12, 11, 12, 8])[0]
    if kind == "all":
        chat.add(pick(rng, block["all"]), pick(rng, block["tell"], l=listed), holds=listed, asked=True)
    elif kind == "has":
        other = rng.choice(names.entries("groceries"))
        thing = rng.choice(things) if rng.random() < 0.5 else other
        answer = f"Yes, {thing} is on your list." if thing in things else f"No, your list is {listed}."
        if thing.endswith("s"):
            answer = answer.replace(f"{thing} is on", f"{thing} are on")
        wording = block["has"][1 if thing.endswith("s") else 0]
        chat.add(fill(rng, wording, t=thing), answer, holds=thing if thing in things else listed, asked=True)
    elif kind == "how_many":
        number = number_word(len(things))
        chat.add(pick(rng, block["how_many"]), f"There are {number} things: {listed}.", holds=number, asked=True)
    else:
        thing = things[{"first": 0, "second": 1, "last": -1}[kind]]
        chat.add(pick(rng, block[kind]), f"The {kind} thing is {thing}.", holds=thing, asked=True)


def people_chat(rng: random.Random) -> Chat:
    """Some names, asked for later."""
    chat, block = Chat(), TURNS["people"]
    listed = join_list([one.name for one in names.people(rng, rng.randrange(2, 5))])
    chat.add(pick(rng, block["say"], l=listed), pick(rng, block["ok"], l=listed))
    interlude(rng, chat, rng.choices([0, 1, 2], [40, 40, 20])[0])
    chat.add(pick(rng, block["all"]), pick(rng, block["tell"], l=listed), holds=listed, asked=True)
    return chat


def own_words_chat(rng: random.Random) -> Chat:
    """What the assistant itself named or suggested, asked for later."""
    chat = Chat()
    blocks = rng.sample(OWN_WORDS, rng.choices([1, 2], [70, 30])[0])
    chosen: list[tuple[Block, str]] = []
    for block in blocks:
        x = different_values(rng, block.settings["value"], 1, block.get("values"))[0]
        chosen.append((block, x))
        chat.add(casual(rng, pick(rng, block["ask"])), pick(rng, block["answer"], x=x))
    interlude(rng, chat, rng.choices([0, 1, 2], [45, 35, 20])[0])
    block, x = rng.choice(chosen)
    chat.add(casual(rng, pick(rng, block["again"])), pick(rng, block["tell"], x=x), holds=x, asked=True)
    return chat


def echo_chat(rng: random.Random) -> Chat:
    """A whole turn is asked for again: the first question, the last message, the last answer."""
    chat, block = Chat(), TURNS["echo"]
    interlude(rng, chat, rng.choices([1, 2, 3], [40, 40, 20])[0])
    kind = rng.choice(["asked", "last", "said", "said"])
    if kind == "asked" and not chat.turns[0].endswith("?"):
        kind = "last"
    text, label = {"asked": (chat.turns[0], "you_asked"), "last": (chat.turns[-2], "you_said"),
                   "said": (chat.turns[-1], "i_said")}[kind]
    chat.add(pick(rng, block[kind]), pick(rng, block[label], t=text), holds=text, asked=True)
    return chat


MAKERS = {facts_chat: 52, corrected_chat: 12, untold_chat: 11, list_chat: 9, people_chat: 3, own_words_chat: 9,
          echo_chat: 4}


def chats(seed: int, n: int) -> Iterator[Chat]:
    """n conversations with what has to be remembered in them."""
    rng = random.Random(seed)
    while n > 0:
        chat = rng.choices(list(MAKERS), list(MAKERS.values()))[0](rng)
        if len(chat.turns) <= 14:
            n -= 1
            yield chat


def rows(seed: int, n: int) -> Iterator[tuple[str, list[str]]]:
    """n conversations."""
    for chat in chats(seed, n):
        yield "recall", chat.turns
