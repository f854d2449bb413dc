"""Texts with made-up names and questions about them: the answer has to be copied, it cannot be known. Licence: MIT.

`rows(seed, n)` yields ["context", [user, assistant, ...]]; `readings(seed, n)` the same before it is put together, with
the span that each answer copies. A text is one or more passages. A passage tells some fields of a scene (a shop, a
person, a ferry: tables/scenes.txt), or lists keys with values (tables/listings.txt). Other passages have the same form
with other names and values, so that the name in the question has to be looked up. About one question in five has no
answer: the field is told of nobody, or of another one, or the name is not there.
"""
from __future__ import annotations

import random
import re
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Iterator

from .tables import Block, read_blocks
from .values import different_values, value
from .wording import capital, casual, choose_inside, fill, holes_of, lower_first, pick

NOT_SAID = "The text does not say."
SCENES = read_blocks("scenes")
LISTINGS = read_blocks("listings")
PROMPTS = read_blocks("prompts")["reading"]
UNANSWERABLE = 0.2
PRONOUNS = {"thing": ("It", "it", "Its", "its"), "she": ("She", "she", "Her", "her"), "he": ("He", "he", "His", "his")}


@dataclass(frozen=True)
class Asked:
    """A question with its answer. span: what the answer copies out of the text, None where the text does not say."""

    question: str
    answer: str
    span: str | None
    about: str                                   # the field or listing, "shop.opens"
    subject: str                                 # whom or what it is about, as the question names it


@dataclass(frozen=True)
class Reading:
    """A text with questions about it."""

    context: str
    asked: list[Asked]


@dataclass
class Entry:
    """What a passage tells of one subject: field -> value."""

    scene: str
    subject: str
    form: str                                    # thing, she, he or note
    facts: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Told:
    """A sentence of a passage. start: the subject with which it begins, empty if it begins otherwise."""

    text: str
    start: str = ""


@lru_cache(maxsize=None)
def fields_of(scene: str) -> list[str]:
    """The names of a scene's fields."""
    return [name for name in SCENES if name.startswith(f"{scene}.")]


@lru_cache(maxsize=None)
def scene_names() -> list[str]:
    """The scenes, without their fields."""
    return [name for name in SCENES if "." not in name]


def fill_values(rng: random.Random, template: str) -> str:
    """A template whose holes are kinds of values: "the {made} bridge"."""
    text = choose_inside(rng, template)
    filled = fill(rng, text, **{hole: value(rng, hole) for hole in holes_of(text)})
    return filled if text[:1] in "{" or text[:1].isupper() else lower_first_letter(filled)


def lower_first_letter(text: str) -> str:
    """The text with a small first letter."""
    return text[:1].lower() + text[1:]


def new_subject(rng: random.Random, scene: str, taken: str) -> Entry:
    """A subject of a scene whose name does not occur in what is taken already."""
    block = SCENES[scene]
    while True:
        name = fill_values(rng, rng.choice(block["subject"]))
        if name.lower() not in taken.lower() and taken.lower() not in name.lower() or not taken:
            break
    kind = block.settings["kind"]
    if kind == "person":
        kind = rng.choice(["she", "he"])
    return Entry(scene, name, kind)


def new_entries(rng: random.Random, scene: str, count: int) -> list[Entry]:
    """Several subjects of one scene, with some fields each; a field that two of them have differs in its value."""
    entries: list[Entry] = []
    for _ in range(count):
        taken = " / ".join(entry.subject for entry in entries)
        entries.append(new_subject(rng, scene, taken))
    names = fields_of(scene)
    shared = rng.sample(names, min(len(names), rng.choice([1, 2, 2, 3])))
    for name in names:
        block = SCENES[name]
        values = different_values(rng, block.settings["value"], count, block.get("values"))
        for entry, new in zip(entries, values):
            likely = 0.85 if name in shared else 0.3 if count > 1 else 0.45
            if rng.random() < likely and new.lower() not in entry.subject.lower():
                entry.facts[name] = new
    return [entry for entry in entries if entry.facts] or new_entries(rng, scene, count)


def tell_fact(rng: random.Random, entry: Entry, name: str, pronoun: bool, wordings: list[str] | None = None) -> Told:
    """The sentence of a passage that tells one field. A pronoun stands only where it sounds well, not behind "of"."""
    say = rng.choice(wordings or SCENES[name]["say"])
    if pronoun and not re.search(r"\b(of|at|on|in|for|to) \{s\}", say):
        big, small, big_own, small_own = PRONOUNS[entry.form]
    else:
        big = small = entry.subject
        big_own = small_own = f"{entry.subject}'s"
    return Told(fill(rng, say, x=entry.facts[name], S=big, s=small, P=big_own, p=small_own),
                f"{capital(big)} " if say.startswith("{S} ") else "")


def first_fact(rng: random.Random, entry: Entry, name: str) -> Told:
    """The first sentence of a passage: it has to name the subject."""
    wordings = [say for say in SCENES[name]["say"] if re.search(r"\{[SsPp]\}", say)]
    if wordings:
        return tell_fact(rng, entry, name, pronoun=False, wordings=wordings)
    told = tell_fact(rng, entry, name, pronoun=False)
    return Told(f"{capital(entry.subject)}: {lower_first(told.text)}")


def passage_of(rng: random.Random, entry: Entry) -> str:
    """The passage of an entry: its fields in any order, the name first, then mostly pronouns, and an idle sentence."""
    names = list(entry.facts)
    rng.shuffle(names)
    if entry.form == "note":
        sentences = [pick(rng, SCENES[entry.scene]["opening"], n=entry.subject)]
        sentences += [pick(rng, SCENES[name]["say"], x=entry.facts[name]) for name in names]
    else:
        told = [first_fact(rng, entry, names[0])]
        told += [tell_fact(rng, entry, name, pronoun=rng.random() < 0.75) for name in names[1:]]
        sentences = join_pairs(rng, told)
    if rng.random() < 0.25:
        sentences.insert(rng.randrange(1, len(sentences) + 1), rng.choice(PROMPTS["said"]))
    return " ".join(sentences)


def join_pairs(rng: random.Random, told: list[Told]) -> list[str]:
    """The sentences, now and then two with the same subject as one: "It opens at nine and sells tea."."""
    joined: list[str] = []
    before = Told("")
    for one in told:
        if before.start and one.start and " and " not in before.text + one.text and rng.random() < 0.3:
            joined[-1] = f"{before.text[:-1]} and {one.text.removeprefix(one.start)}"
            before = Told("")
        else:
            joined.append(one.text)
            before = one
    return joined


def question_about(rng: random.Random, entry: Entry, name: str, by_name: bool) -> str:
    """A question for a field. by_name: it has to hold the subject's name."""
    wordings = SCENES[name]["ask"]
    if by_name:
        wordings = [ask for ask in wordings if "{n}" in ask]
    return pick(rng, wordings, n=entry.subject)


def full_answer(rng: random.Random, entry: Entry, name: str) -> str:
    """A short sentence with the value."""
    return pick(rng, SCENES[name]["tell"], n=entry.subject, x=entry.facts[name])


def ask_told(rng: random.Random, entry: Entry, name: str, by_name: bool) -> Asked:
    """A question that the text answers."""
    span = entry.facts[name]
    return Asked(question_about(rng, entry, name, by_name), full_answer(rng, entry, name), span, name, entry.subject)


def ask_check(rng: random.Random, entry: Entry, name: str, others: list[str]) -> Asked | None:
    """A yes/no question: the true value, or another one that is not told of this subject."""
    told = [tell for tell in SCENES[name]["tell"] if "{n}" in tell]
    if not told or entry.form == "note":
        return None
    tell = rng.choice(told)
    truth = fill(rng, tell, n=entry.subject, x=entry.facts[name])
    block = SCENES[name]
    false_values = others or different_values(rng, block.settings["value"], 3, block.get("values"))
    false_values = [one for one in false_values if one.lower() != entry.facts[name].lower()]
    right = rng.random() < 0.5 or not false_values
    statement = truth if right else fill(rng, tell, n=entry.subject, x=rng.choice(false_values))
    if entry.subject[0].islower():
        truth = lower_first_letter(truth)
    low = lower_first_letter(statement) if entry.subject[0].islower() else statement
    question = pick(rng, PROMPTS["true"], statement=statement, low=low.rstrip("."))
    answer = f"Yes, {truth}" if right else f"No, {truth}"
    return Asked(question, answer, entry.facts[name], name, entry.subject)


def ask_untold(rng: random.Random, entries: list[Entry], text: str) -> Asked | None:
    """A question of the same kind that the text does not answer: another field, or another name."""
    entry = rng.choice(entries)
    if rng.random() < 0.35 and entry.form != "note":
        stranger = new_subject(rng, entry.scene, text)
        name = rng.choice(list(entry.facts))
        return Asked(question_about(rng, stranger, name, by_name=True), NOT_SAID, None, name, stranger.subject)
    missing = [name for name in fields_of(entry.scene) if name not in entry.facts]
    near = [name for name in missing if any(name in other.facts for other in entries)]
    for name in rng.sample(near, len(near)) + rng.sample(missing, len(missing)):
        clashes = SCENES[name].settings.get("clash", "").split(",")
        if not any(clash in entry.facts for clash in clashes):
            by_name = len(entries) > 1
            return Asked(question_about(rng, entry, name, by_name), NOT_SAID, None, name, entry.subject)
    return None


def scene_questions(rng: random.Random, entries: list[Entry], text: str, count: int) -> list[Asked]:
    """Some questions about the entries of one scene."""
    asked: list[Asked] = []
    pairs = [(entry, name) for entry in entries for name in entry.facts]
    rng.shuffle(pairs)
    for _ in range(count):
        new: Asked | None = None
        if rng.random() < UNANSWERABLE:
            new = ask_untold(rng, entries, text)
        elif pairs:
            entry, name = pairs.pop()
            if rng.random() < 0.07:
                new = ask_check(rng, entry, name, [one.facts[name] for one in entries if name in one.facts])
            new = new or ask_told(rng, entry, name, by_name=len(entries) > 1)
        if new and new.question not in [one.question for one in asked]:
            asked.append(new)
    return asked


def scene_reading(rng: random.Random) -> Reading | None:
    """Passages about one scene, now and then with passages about something else between them."""
    scene = rng.choice(scene_names())
    entries = new_entries(rng, scene, rng.choices([1, 2, 3, 4], [45, 28, 17, 10])[0])
    passages = [passage_of(rng, entry) for entry in entries]
    if rng.random() < 0.2:
        other = rng.choice([name for name in scene_names() if name != scene])
        passages.append(passage_of(rng, new_entries(rng, other, 1)[0]))
    rng.shuffle(passages)
    text = join_passages(rng, passages)
    asked = scene_questions(rng, entries, text, rng.choices([1, 2, 3, 4], [45, 25, 18, 12])[0])
    return Reading(text, asked) if asked else None


def join_passages(rng: random.Random, passages: list[str]) -> str:
    """Passages as one text: numbered, in lines, or one after the other."""
    if len(passages) == 1:
        return passages[0]
    style = rng.random()
    if style < 0.45:
        return "\n".join(f"[{at}] {passage}" for at, passage in enumerate(passages, 1))
    return ("\n" if style < 0.65 else " ").join(passages)


def listing_text(rng: random.Random, block: Block, pairs: list[tuple[str, str]]) -> str:
    """The items of a list in one wording, after its heading."""
    item = rng.choice(block["item"])
    items = [choose_inside(rng, item) for _ in pairs]
    parts = [fill_keys(rng, one, pair) for one, pair in zip(items, pairs)]
    head = fill_values(rng, rng.choice(block["head"]))
    if rng.random() < 0.3:
        return head + "\n" + "\n".join(f"- {part}" for part in parts)
    if " " in item.replace("{k}", "").replace("{x}", "").strip() and rng.random() < 0.4:
        return f"{head} {' '.join(capital(part) + '.' for part in parts)}"
    return f"{head} {', '.join(parts)}."


def fill_keys(rng: random.Random, template: str, pair: tuple[str, str]) -> str:
    """An item with its key and value; it keeps a small first letter."""
    filled = fill(rng, template, k=pair[0], x=pair[1])
    first = template.format(k=pair[0], x=pair[1]) if ":a}" not in template else filled
    return filled if first[:1].isupper() else lower_first_letter(filled)


def list_reading(rng: random.Random) -> Reading | None:
    """A list, and questions from a key to its value or back."""
    block = LISTINGS[rng.choice(list(LISTINGS))]
    count = rng.randrange(3, 7)
    keys = different_values(rng, block.settings["key"], count + 1, block.get("keys"))
    values = different_values(rng, block.settings["value"], len(keys), block.get("values"))
    pairs = list(zip(keys, values))
    if len(pairs) < 4:
        return None
    absent = pairs.pop()
    text = listing_text(rng, block, pairs)
    asked: list[Asked] = []
    for key, one in rng.sample(pairs, rng.choices([1, 2, 3], [45, 30, 25])[0]):
        about = f"list.{block.name}"
        values_of_item = {"k": key, "x": one}
        if rng.random() < UNANSWERABLE:
            if absent[0].lower() not in text.lower():
                asked.append(Asked(pick(rng, block["ask"], k=absent[0]), NOT_SAID, None, about, absent[0]))
        elif rng.random() < 0.35:
            question, answer = pick(rng, block["back"], x=one), pick(rng, block["told"], **values_of_item)
            asked.append(Asked(question, answer, key, about, one))
        else:
            question, answer = pick(rng, block["ask"], k=key), pick(rng, block["tell"], **values_of_item)
            asked.append(Asked(question, answer, one, about, key))
    unique = {one.question: one for one in asked}
    return Reading(text, list(unique.values())) if asked else None


def readings(seed: int, n: int) -> Iterator[Reading]:
    """n texts with questions."""
    rng = random.Random(seed)
    while n > 0:
        reading = list_reading(rng) if rng.random() < 0.25 else scene_reading(rng)
        if reading:
            n -= 1
            yield reading


def first_message(rng: random.Random, reading: Reading, question: str) -> str:
    """Text and first question in the form of retrieval prompts, or as people write."""
    question = casual(rng, question, typos=0.01)
    if rng.random() < 0.5:
        return f"Context: {reading.context}\n\nQuestion: {question}"
    wordings = PROMPTS["plain"]
    if "\n" in reading.context:                  # the question gets a line of its own
        wordings = [one for one in wordings if "{c}@" in one or one.endswith("@{c}")]
    template = rng.choice(wordings)
    return template.format(c=reading.context, q=question, low=lower_first(question)).replace("@", "\n")


def said(rng: random.Random, asked: Asked, strict: bool) -> str:
    """The answer: mostly the sentence; after a retrieval prompt now and then the bare span."""
    bare = strict and asked.span and rng.random() < 0.3 and not asked.answer.startswith(("Yes,", "No,"))
    return f"{capital(asked.span)}." if bare else asked.answer


def rows(seed: int, n: int) -> Iterator[tuple[str, list[str]]]:
    """n conversations: a text with a question, and up to three more questions about it."""
    rng = random.Random(f"rows {seed}")
    for reading in readings(seed, n):
        first, *others = reading.asked
        message = first_message(rng, reading, first.question)
        strict = message.startswith("Context: ")
        turns = [message, said(rng, first, strict)]
        for asked in others:
            turns += [casual(rng, asked.question, typos=0.01), said(rng, asked, strict)]
        yield "context", turns
