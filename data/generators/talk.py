"""Small talk: intents with many wordings, dialogues of two or three exchanges, jokes, riddles, fun facts, terms.

Licence: MIT. `rows(seed, n)` yields ["talk", [user, assistant, ...]]. The wordings stand in talk.txt (one message and
its answers), dialogues.txt (messages that follow each other), extras.txt and terms.txt.
"""
from __future__ import annotations

import random
from typing import Iterator

from .tables import read_blocks, read_tables
from .values import value
from .wording import TALK_OPENINGS, casual, fill, holes_of, opened, pick

Exchange = tuple[str, str]
INTENTS = read_blocks("talk")
DIALOGUES = read_blocks("dialogues")
TERMS = [block for name, block in read_blocks("terms").items() if name.startswith("term.")]
FAVORITES = [block for name, block in read_blocks("terms").items() if name.startswith("favorite.")]
JOKES = read_tables("extras")["jokes"]
RIDDLES = read_tables("extras")["riddles"]
FUN_FACTS = read_tables("extras")["fun_facts"]
ASK = read_blocks("terms")["ask"]
# these answer something, so they do not begin a chat
ANSWERS = {"imfine", "emptyish", "idontknow", "agree", "really", "haha", "notfunny", "wrong", "dontunderstand", "sorry",
           "sure_yes", "no_thanks", "never_mind", "compliment_small", "repeat_self", "too_long", "back"}
GRAVE = {"mypetdied", "sad", "lostjob", "missing", "scared"}          # nothing cheerful comes before or after
FILLERS = ["howareyou", "whats_new", "music", "books", "canyoudo", "quote", "thinking", "games_played", "opinion",
           "smalltalk_request", "howbig", "alive", "whomade", "yourname", "can_you_do_more", "how_was_day"]
SURE = ["", "", "Here is one: ", "Sure! ", "Okay: "]


def from_intent(rng: random.Random, name: str) -> Exchange:
    """One message of an intent and one of its answers."""
    block = INTENTS[name]
    message = rng.choice(block["you"])
    if block.settings["place"] == "middle" and name not in ANSWERS:
        message = opened(rng, message, TALK_OPENINGS, 0.12)
    return message, rng.choice(block["bot"])


def single(rng: random.Random) -> list[Exchange]:
    """One message of any intent."""
    return [from_intent(rng, rng.choice(list(INTENTS)))]


def filler(rng: random.Random) -> Exchange:
    """A harmless exchange for between other turns."""
    kind = rng.random()
    if kind < 0.2:
        return joke(rng)[0]
    if kind < 0.35:
        return fun_fact(rng)[0]
    return from_intent(rng, rng.choice(FILLERS))


def chain(rng: random.Random) -> list[Exchange]:
    """A greeting, some messages, perhaps a goodbye."""
    by_place: dict[str, list[str]] = {"open": [], "middle": [], "close": [], "alone": []}
    for name, block in INTENTS.items():
        if name not in ANSWERS | GRAVE:
            by_place[block.settings["place"]].append(name)
    talk = [from_intent(rng, rng.choice(by_place["open"]))] if rng.random() < 0.6 else []
    if talk and "how are you" in talk[-1][1].lower() and rng.random() < 0.6:
        talk.append(from_intent(rng, "imfine"))
    for name in rng.sample(by_place["middle"], rng.choice([1, 1, 2])):
        talk.append(from_intent(rng, name))
    if rng.random() < 0.45:
        talk.append(from_intent(rng, rng.choice(by_place["close"])))
    return talk


def dialogue(rng: random.Random) -> list[Exchange]:
    """A dialogue of the table, of two or three exchanges."""
    block = rng.choice(list(DIALOGUES.values()))
    text = " ".join(wording for wordings in block.lists.values() for wording in wordings)
    holes = {hole: value(rng, hole) for hole in holes_of(text)}
    length = 3 if block.get("u3") and rng.random() < 0.6 else 2
    return [(pick(rng, block[f"u{at}"], **holes), pick(rng, block[f"b{at}"], **holes)) for at in range(1, length + 1)]


def joke(rng: random.Random) -> list[Exchange]:
    """A joke, perhaps another one or its explanation."""
    first, second = rng.sample(JOKES, 2)
    talk = [(pick(rng, ASK["joke"]), f"{rng.choice(SURE)}{first['ask']} {first['answer']}")]
    if rng.random() < 0.4:
        talk.append((pick(rng, ASK["another"]), f"{rng.choice(['', 'Sure! '])}{second['ask']} {second['answer']}"))
    elif first["why"] != "-":
        talk.append((pick(rng, ASK["not_got_it"]), first["why"]))
    elif rng.random() < 0.4:
        talk.append(from_intent(rng, rng.choice(["haha", "notfunny"])))
    return talk


def riddle(rng: random.Random) -> list[Exchange]:
    """A riddle, with its answer at once or when it is asked for."""
    one = rng.choice(RIDDLES)
    answer = one["answer"][0].lower() + one["answer"][1:]
    if rng.random() < 0.4:
        return [(pick(rng, ASK["riddle"]), f"{rng.choice(SURE)}{one['ask']} The answer: {answer}")]
    given = rng.choice(["The answer is: ", "Answer: ", "It is "]) + answer
    return [(pick(rng, ASK["riddle"]), rng.choice(SURE) + one["ask"]), (pick(rng, ASK["no_clue"]), given)]


def fun_fact(rng: random.Random) -> list[Exchange]:
    """A fun fact, perhaps with its reason or another one."""
    first, second = rng.sample(FUN_FACTS, 2)
    talk = [(pick(rng, ASK["fact"]), rng.choice([*SURE, "Did you know? "]) + first["fact"])]
    follow = rng.random()
    if follow < 0.4:
        talk.append((pick(rng, ASK["why"]), first["why"]))
    elif follow < 0.6:
        talk.append((pick(rng, ASK["another"]), second["fact"]))
    elif follow < 0.75:
        talk.append(from_intent(rng, "really"))
    return talk


def term(rng: random.Random) -> list[Exchange]:
    """A word of the course, perhaps once more in simple words."""
    block = rng.choice(TERMS)
    talk = [(pick(rng, ASK["term"], t=rng.choice(block["names"])), rng.choice(block["means"]))]
    if rng.random() < 0.4:
        talk.append((pick(rng, ASK["simpler"]), block["simple"][0]))
    return talk


def favorite(rng: random.Random) -> list[Exchange]:
    """The favorite color, food and so on of a program."""
    block = rng.choice(FAVORITES)
    name = rng.choice(block["names"])
    answers = block["bot"] + [fill(rng, one, t=name) for one in ASK["no_favorite"]]
    return [(pick(rng, ASK["favorite"], t=name), rng.choice(answers))]


MAKERS = {single: 38, chain: 20, dialogue: 16, joke: 6, riddle: 4, fun_fact: 6, term: 7, favorite: 3}


def rows(seed: int, n: int) -> Iterator[tuple[str, list[str]]]:
    """n conversations."""
    rng = random.Random(seed)
    for _ in range(n):
        turns: list[str] = []
        for message, answer in rng.choices(list(MAKERS), list(MAKERS.values()))[0](rng):
            turns += [casual(rng, message, typos=0.04), answer]
        yield "talk", turns
