"""Facts: countries, animals, everyday things, people, the order of days and planets, yes and no. Licence: MIT.

`rows(seed, n)` yields ["fact", [user, assistant, ...]]. What is asked, and how, stands in the tables world, things,
words, order and relations; questions.txt holds single questions.
"""
from __future__ import annotations

import random
from typing import Iterator

from .tables import Block, read_blocks, read_tables
from .wording import QUESTION_OPENINGS, article, capital, casual, holes_of, join_list, number_word, opened, pick

Exchange = tuple[str, str]
RELATIONS = read_blocks("relations")
ORDER = {name: block for name, block in read_blocks("order").items() if "names" in block.lists}
ASK = {name: block for name, block in read_blocks("order").items() if name.startswith("ask_")}
QUESTIONS = read_tables("questions")["questions"]
YESNO = read_tables("questions")["yesno"]
CATEGORIES = read_tables("words")["categories"]
# categories of which no member belongs to another one: only these are asked "is it A or B?"
APART = ["fruit", "vegetable", "bird", "insect", "piece of clothing", "piece of furniture", "musical instrument",
         "vehicle", "body part", "metal", "month", "family member", "language", "building", "kind of weather"]
TWO_MEANINGS = {"orange", "iris", "palm", "hail"}
WITHOUT_ARTICLE = {"kind of weather", "language", "month", "metal"}
MASS_NOUNS = {"broccoli", "spinach", "lettuce", "celery", "asparagus", "cauliflower", "cabbage"}
PLANETS = {"the biggest planet": "Jupiter", "the smallest planet": "Mercury", "the red planet": "Mars",
           "the planet closest to the Sun": "Mercury", "the planet farthest from the Sun": "Neptune",
           "the hottest planet": "Venus", "the planet with the big bright rings": "Saturn",
           "the planet we live on": "Earth", "the planet with the Great Red Spot": "Jupiter",
           "the planet that lies on its side": "Uranus"}
WHOLE = {"month": "of the year", "planet": "from the Sun", "day": "of a week that starts on Monday"}
ORDINALS = "first second third fourth fifth sixth seventh eighth ninth tenth eleventh twelfth".split()
PARTICIPLES = {"wrote": "written", "painted": "painted", "invented": "invented", "discovered": "discovered",
               "composed": "composed", "built": "built"}
MONTH_DAYS = [31, 28, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31]


def table_of(relation: Block) -> list[dict[str, str]]:
    """The rows that a relation is about."""
    file, table = relation.settings["table"].split(".")
    return read_tables(file)[table]


def values_of(relation: Block) -> set[str]:
    """The columns that a relation's wordings use."""
    text = " ".join(relation["ask"] + relation.get("tell"))
    flag = {relation.settings["flag"]} if "flag" in relation.settings else set()
    return flag | set(holes_of(text)) & set(table_of(relation)[0])


def usable(relation: Block, row: dict[str, str]) -> bool:
    """Whether a row has all that the relation needs, and the question does not hold its own answer."""
    known = all(row[column] != "-" for column in values_of(relation))
    return known and row.get("country") != row.get("capital", "")


def legs_in_words(row: dict[str, str]) -> dict[str, str]:
    """A row whose number of legs is a word, and with the participle of its verb."""
    row = dict(row)
    if row.get("legs", "-") != "-":
        row["legs"] = "no" if row["legs"] == "0" else number_word(int(row["legs"]))
    if "verb" in row:
        row["done"] = PARTICIPLES[row["verb"]]
    return row


def ask_relation(rng: random.Random, relation: Block, row: dict[str, str]) -> Exchange:
    """One question of a relation about one row, with its answer."""
    row = legs_in_words(row)
    checked = relation.settings.get("checks")
    if checked and rng.random() < 0.3:
        return ask_check(rng, relation, row, checked)
    question = pick(rng, relation["ask"], **row)
    if "flag" in relation.settings:
        answers = relation["yes" if row[relation.settings["flag"]] == "y" else "no"]
    else:
        answers = relation["tell"]
    return question, pick(rng, answers, **row)


def ask_check(rng: random.Random, relation: Block, row: dict[str, str], column: str) -> Exchange:
    """A yes/no question about the value of a column: the true one, or that of another row."""
    others = sorted({other[column] for other in map(legs_in_words, table_of(relation))} - {row[column], "-"})
    if rng.random() < 0.5:
        return pick(rng, relation["check"], **row), pick(rng, relation["yes"], **row)
    wrong = {**row, column: rng.choice(others)}
    return pick(rng, relation["check"], **wrong), pick(rng, relation["no"], **wrong, right=row[column])


def relation_talk(rng: random.Random) -> list[Exchange]:
    """Some questions: about one country or animal, or of one relation about several rows."""
    relation = rng.choice(list(RELATIONS.values()))
    rows = [row for row in table_of(relation) if usable(relation, row)]
    row = rng.choice(rows)
    if relation.settings["table"].startswith("world"):
        others = [other for other in RELATIONS.values()
                  if other.settings["table"] == relation.settings["table"] and usable(other, row)]
        return [ask_relation(rng, one, row) for one in rng.sample(others, min(3, len(others)))]
    return [ask_relation(rng, relation, one) for one in rng.sample(rows, 3)]


def neighbour(names: list[str], at: int, step: int, circle: bool) -> str | None:
    """The name before or after another one, None past the end of what is no circle."""
    place = at + step
    if not circle and not 0 <= place < len(names):
        return None
    return names[place % len(names)]


def order_talk(rng: random.Random) -> list[Exchange]:
    """What comes before or after, which is the third, how many days has a month."""
    makers = [ask_neighbour, ask_neighbour, ask_place, ask_month_length, ask_planet]
    return [rng.choice(makers)(rng) for _ in range(3)]


def ask_neighbour(rng: random.Random) -> Exchange:
    """Which day, month, season or planet comes after or before another one."""
    kind, order = rng.choice(list(ORDER.items()))
    names, circle = order["names"], order.settings["circle"] == "yes"
    side, step = rng.choice([("after", 1), ("before", -1)])
    at = rng.choice([place for place in range(len(names)) if neighbour(names, place, step, circle)])
    values = {"kind": kind, "side": side, "a": names[at], "b": neighbour(names, at, step, circle)}
    block = ASK["ask_next"]
    if kind == "day" and rng.random() < 0.3:
        values["when"], values["verb"] = ("tomorrow", "is") if step == 1 else ("yesterday", "was")
        return pick(rng, block["ask_day"], **values), pick(rng, block["tell_day"], **values)
    return pick(rng, block["ask"], **values), pick(rng, block["tell"], **values)


def ask_place(rng: random.Random) -> Exchange:
    """Which is the fourth month or planet."""
    kind, whole = rng.choice(list(WHOLE.items()))
    names = ORDER[kind]["names"]
    at = rng.randrange(len(names))
    values = {"kind": kind, "place": ORDINALS[at], "whole": whole, "name": names[at]}
    return pick(rng, ASK["ask_place"]["ask"], **values), pick(rng, ASK["ask_place"]["tell"], **values)


def ask_month_length(rng: random.Random) -> Exchange:
    """How many days a month has."""
    at = rng.randrange(12)
    month = ORDER["month"]["names"][at]
    question = pick(rng, ASK["ask_length"]["ask"], month=month)
    if month == "February":
        return question, "February has 28 days, or 29 in a leap year."
    return question, pick(rng, ASK["ask_length"]["tell"], month=month, days=MONTH_DAYS[at])


def ask_planet(rng: random.Random) -> Exchange:
    """Which planet is the biggest, the red one and so on."""
    what, name = rng.choice(list(PLANETS.items()))
    block = ASK["ask_planet"]
    return pick(rng, block["ask"], what=what), pick(rng, block["tell"], what=what, name=name)


def question_talk(rng: random.Random) -> list[Exchange]:
    """Single questions of the table."""
    talk = []
    for row in rng.sample(QUESTIONS, 2):
        question = opened(rng, pick(rng, [row["question"]]), QUESTION_OPENINGS, 0.45)
        answer = row["full"] if rng.random() < 0.75 else row["short"] + "."
        talk.append((question, answer.replace("D.C..", "D.C.")))
    return talk


def yesno_talk(rng: random.Random) -> list[Exchange]:
    """Yes/no questions with a reason."""
    talk = []
    for row in rng.sample(YESNO, 3):
        form = rng.choice(["{answer}, {reason}.", "{answer}. {big}."])
        answer = form.format(answer=row["answer"], reason=row["reason"], big=capital(row["reason"]))
        talk.append((opened(rng, row["question"], QUESTION_OPENINGS, 0.45), answer.replace("D.C..", "D.C.")))
    return talk


def members(category: dict[str, str]) -> list[str]:
    """The members of a category, without words that mean something else too."""
    return [word for word in category["members"].split(", ") if word not in TWO_MEANINGS]


def category_talk(rng: random.Random) -> list[Exchange]:
    """Is it A or B, is it an A, what kind of thing is it."""
    apart = [category for category in CATEGORIES if category["one"] in APART]
    talk = []
    for _ in range(3):
        mine, other = rng.sample(apart, 2)
        word = rng.choice(members(mine))
        bare = mine["one"] in WITHOUT_ARTICLE or word in MASS_NOUNS or word[0].isupper()
        talk.append(ask_category(rng, word if bare else article(word), mine, other))
    return talk


def ask_category(rng: random.Random, thing: str, mine: dict[str, str], other: dict[str, str]) -> Exchange:
    """One question about what a thing is."""
    block = ASK["ask_kind"]
    values = {"thing": thing, "one": mine["one"], "many": mine["many"]}
    kind = rng.choice(["either", "what", "yes", "no"])
    if kind == "either":
        first, second = rng.sample([mine["one"], other["one"]], 2)
        return pick(rng, block["either"], first=first, second=second, **values), pick(rng, block["tell"], **values)
    if kind == "what":
        return pick(rng, block["what"], **values), pick(rng, block["group"], **values)
    asked = mine["one"] if kind == "yes" else other["one"]
    return pick(rng, block["check"], asked=asked, **values), pick(rng, block[kind], **values)


def list_talk(rng: random.Random) -> list[Exchange]:
    """Name three of a kind."""
    return [ask_list(rng, rng.choice(CATEGORIES)) for _ in range(2)]


def ask_list(rng: random.Random, category: dict[str, str]) -> Exchange:
    """One to five members of a category."""
    number = rng.choice([1, 2, 3, 3, 3, 3, 4, 5])
    chosen = rng.sample(category["members"].split(", "), number)
    values = {"n": number_word(number) if rng.random() < 0.75 else number, "list": join_list(chosen),
              "what": category["one" if number == 1 else "many"]}
    block = ASK["ask_list"]
    return pick(rng, block["ask"], **values), pick(rng, block["single" if number == 1 else "tell"], **values)


MAKERS = {relation_talk: 40, order_talk: 8, question_talk: 22, yesno_talk: 14, category_talk: 8, list_talk: 8}


def rows(seed: int, n: int) -> Iterator[tuple[str, list[str]]]:
    """n conversations of one to three exchanges."""
    rng = random.Random(seed)
    for _ in range(n):
        talk = rng.choices(list(MAKERS), list(MAKERS.values()))[0](rng)
        turns: list[str] = []
        for question, answer in talk[:rng.choices([1, 2, 3], [60, 28, 12])[0]]:
            turns += [casual(rng, question), answer]
        yield "fact", turns
