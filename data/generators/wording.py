"""Wordings: choices inside a template, articles, plurals, numbers in words, and how people really type. Licence: MIT.

    fill(rng, "<What is/What's> the capital of {country}?", country="Peru")
"""
from __future__ import annotations

import random
import re
from typing import Iterable, Sequence

STARTERS = set("""what what's who who's when where why how which whose whom is are was were do does did can could will
would should if please name tell give count add take write find say put spell make list sort the there on at in from to
with by for until after under as""".split())
CHOICE = re.compile(r"<([^<>]*)>")
HOLE = re.compile(r"{(\w+)")
ONES = ("zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen "
        "seventeen eighteen nineteen").split()
TENS = "zero ten twenty thirty forty fifty sixty seventy eighty ninety".split()
VOWEL_SOUND = re.compile(r"(?!uni|use|usu|one\b|once|eu|ewe|ukul)[aeiou]|hour|honest|heir|[8]\b|8\d|11\b|18\b", re.I)
ODD_PLURALS = {"child": "children", "man": "men", "woman": "women", "foot": "feet", "tooth": "teeth", "mouse": "mice",
               "goose": "geese", "person": "people", "sheep": "sheep", "fish": "fish", "deer": "deer", "leaf": "leaves",
               "loaf": "loaves", "knife": "knives", "shelf": "shelves", "scarf": "scarves", "potato": "potatoes",
               "tomato": "tomatoes", "wolf": "wolves", "calf": "calves", "goldfish": "goldfish"}


def article(word: str) -> str:
    """A word with "a" or "an" in front, unless it has an article or is a name."""
    if word.lower().startswith(("a ", "an ", "the ", "some ")):
        return word
    return ("an " if VOWEL_SOUND.match(word) else "a ") + word


def plural(noun: str) -> str:
    """The plural of the last word of a noun."""
    head, _, last = noun.rpartition(" ")
    if last in ODD_PLURALS:
        many = ODD_PLURALS[last]
    elif re.search(r"(s|x|z|ch|sh)$", last):
        many = last + "es"
    elif re.search(r"[^aeiou]y$", last):
        many = last[:-1] + "ies"
    else:
        many = last + "s"
    return f"{head} {many}".strip()


def number_word(number: int) -> str:
    """A number from 0 to 1000 in words."""
    if number < 20:
        return ONES[number]
    if number < 100:
        rest = f"-{ONES[number % 10]}" if number % 10 else ""
        return TENS[number // 10] + rest
    if number < 1000:
        rest = f" and {number_word(number % 100)}" if number % 100 else ""
        return f"{ONES[number // 100]} hundred{rest}"
    if number == 1000:
        return "one thousand"
    raise ValueError(f"{number}: words are known up to 1000")


def count_of(number: int, noun: str) -> str:
    """A number with its noun: "1 apple", "3 apples"."""
    return f"{number} {noun if number == 1 else plural(noun)}"


def join_list(items: Iterable[str], last: str = "and") -> str:
    """Items as people say them: "milk, eggs and tea"."""
    items = list(items)
    if len(items) == 1:
        return items[0]
    return f"{', '.join(items[:-1])} {last} {items[-1]}"


def capital(text: str) -> str:
    """The text with its first letter as a capital."""
    return text[:1].upper() + text[1:]


def lower_first(text: str) -> str:
    """The text with a small first letter where its first word is one that opens questions; names keep their capital."""
    return text[:1].lower() + text[1:] if text.split(" ")[0].rstrip(",").lower() in STARTERS else text


class Word(str):
    """A value of a template: {noun:a} puts an article in front, {noun:s} makes the plural, {noun:C} a capital."""

    def __format__(self, form: str) -> str:
        forms = {"": str, "a": article, "s": plural, "C": capital}
        return forms[form](str(self))


def holes_of(text: str) -> list[str]:
    """The names of a template's holes, in the order of the alphabet: "{b} and {a:s}" has a and b."""
    return sorted(set(HOLE.findall(text)))


def choose_inside(rng: random.Random, template: str) -> str:
    """Each <a/b/c> of a template replaced by one of its parts, the inner ones first."""
    while CHOICE.search(template):
        template = CHOICE.sub(lambda found: rng.choice(found[1].split("/")), template, count=1)
    return template


def fill(rng: random.Random, template: str, **values: object) -> str:
    """One wording of a template, with its values, single spaces and a capital at the beginning."""
    text = choose_inside(rng, template)
    text = text.format(**{name: Word(value) for name, value in values.items()})
    text = re.sub(r" +([?.,!])", r"\1", re.sub(r" {2,}", " ", text)).strip()
    return capital(text)


def pick(rng: random.Random, templates: Sequence[str], **values: object) -> str:
    """`fill` with one of several templates."""
    return fill(rng, rng.choice(templates), **values)


def typo(rng: random.Random, text: str) -> str:
    """One small slip in a longer word of small letters: two letters swapped, one left out, or one doubled."""
    places = [found for found in re.finditer(r"\b[a-z]{5,}\b", text)]
    if not places:
        return text
    word = rng.choice(places)
    at = rng.randrange(word.start() + 1, word.end() - 1)
    slip = rng.choice(["swap", "drop", "double"])
    if slip == "swap":
        return text[:at] + text[at + 1] + text[at] + text[at + 2:]
    if slip == "drop":
        return text[:at] + text[at + 1:]
    return text[:at] + text[at] + text[at:]


def casual(rng: random.Random, text: str, typos: float = 0.03) -> str:
    """A user's line as people type it: mostly as it is, sometimes in small letters, without its mark, with a slip.

    typos: the share of lines with a slip.
    """
    style = rng.random()
    if style < 0.12:
        text = text.lower().rstrip("?!. ") or text
    elif style < 0.18:
        text = text.lower()
    elif style < 0.23:
        text = text.rstrip("?. ") or text
    if rng.random() < typos:
        text = typo(rng, text)
    return text


def opened(rng: random.Random, text: str, openings: Sequence[str], share: float) -> str:
    """A line with one of several openings in front, for a share of the lines: "Hey, who are you?"."""
    if rng.random() >= share:
        return text
    opening = rng.choice(openings)
    return opening + (lower_first(text) if opening.endswith(", ") else text)


QUESTION_OPENINGS = ["Quick question: ", "I have a question. ", "Hey, ", "Tell me, ", "One question: ", "Hello! ",
                     "Hi! ", "So, ", "Okay, ", "Just curious: ", "Next question: "]
TALK_OPENINGS = ["hey, ", "Hey, ", "Hi, ", "ok, ", "So, ", "By the way, ", "Honestly, ", "One more thing: ", "Well, ",
                 "MiniGPT, ", "hey bot, ", "Hello, ", "Please, ", "And ", "Hmm. ", "Oh, "]
