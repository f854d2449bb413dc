"""Small tasks: a sentence with a word, three ideas, rhymes, opposites, spelling, order, politeness, shortening.

Licence: MIT. `rows(seed, n)` yields ["task", [user, assistant, ...]]. Where an answer can be computed (letters, order,
forms of a sentence, sizes), it is; the rest stands in tables/words.txt, tasks.txt and task_tables.txt.
"""
from __future__ import annotations

import random
from typing import Iterator

from . import facts, names, sums
from .tables import read_blocks, read_tables
from .values import value
from .wording import article, capital, casual, pick, plural

Exchange = tuple[str, str]
TASKS = read_blocks("tasks")
TABLES = read_tables("task_tables")
WORDS = read_tables("words")
CATEGORIES = facts.CATEGORIES
FORMS = {"objects": "object_frames", "animals": "animal_frames", "foods": "food_frames", "places": "place_frames",
         "persons": "person_frames", "adjectives": "adjective_frames", "verbs": "verb_frames"}
PLAIN_WORDS = sorted({word for row in CATEGORIES for word in row["members"].split(", ")
                      if word.isalpha() and word.islower()})
RHYMES = [row["words"].split() for row in WORDS["rhymes"]]
ALPHABET = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
APART = [row for row in CATEGORIES if row["one"] in facts.APART]
COMPARED = [("bigger", "smaller"), ("bigger", "smaller"), ("faster", "slower"), ("heavier", "lighter"),
            ("older", "younger")]
PEOPLE = "man woman boy girl teacher farmer neighbor doctor child painter baker sailor".split()
ADJECTIVES = "old small young tired happy quiet little friendly tall hungry strong busy".split()
WHO_ELSE = ["who lives next door", "from the blue house", "with the long hair", "whom I met yesterday",
            "from my school", "in the red coat"]
WHEN = ["early in the morning", "on a cold and rainy day", "after a long time", "without any hurry",
        "as on every other day", "just before it got dark", "while the others were asleep",
        "for the second time this week"]


def from_block(rng: random.Random, name: str, **values: object) -> Exchange:
    """A task of a block with its values, and one of the block's answers."""
    return pick(rng, TASKS[name]["ask"], **values), pick(rng, TASKS[name]["tell"], **values)


def sentence(rng: random.Random) -> Exchange:
    """A sentence with one word, or with two."""
    block, kind = TASKS["sentence"], rng.choice(list(FORMS))
    if rng.random() < 0.15:
        word, wordings = rng.choice(list(TASKS["adverbs"].lists.items()))
        asked = [ask for ask in block["ask"] if "{w:a}" not in ask]
        return pick(rng, asked, w=word), rng.choice(wordings)
    words, frames = TASKS["sentence_words"][kind], TASKS[FORMS[kind]]
    if frames.get("two") and rng.random() < 0.25:
        first, second = rng.sample(words, 2)
        return pick(rng, block["two"], w=first, v=second), pick(rng, frames["two"], w=first, v=second)
    word = rng.choice(words)
    asked = [ask for ask in block["ask"] if "{w:a}" not in ask or kind in ("objects", "animals", "places", "persons")]
    return pick(rng, asked, w=word), pick(rng, frames["say"], w=word)


def ideas(rng: random.Random) -> Exchange:
    """Three of several ideas for a topic."""
    row = rng.choice(TABLES["topics"])
    a, b, c = rng.sample(row["ideas"].split(" + "), 3)
    nouns = row["what"] in ("a story", "a drawing")                 # things, not something that one could do
    wordings = [tell for tell in TASKS["ideas"]["tell"] if not (nouns and "You could" in tell)]
    answer = pick(rng, wordings, a=a, b=b, c=c, A=capital(a), B=capital(b), C=capital(c))
    return pick(rng, TASKS["ideas"]["ask"], k=row["what"]), answer.replace("@", "\n")


def opposite(rng: random.Random) -> Exchange:
    """The opposite of a word, in either direction."""
    row = rng.choice(WORDS["opposites"])
    first, second = rng.sample([row["word"], row["other"]], 2)
    return from_block(rng, "opposite", a=first, b=second)


def synonym(rng: random.Random) -> Exchange:
    """Another word for a word."""
    row = rng.choice(WORDS["synonyms"])
    return from_block(rng, "synonym", a=row["word"], b=row["other"])


def plural_form(rng: random.Random) -> Exchange:
    """The plural of a noun: the odd ones more often."""
    if rng.random() < 0.6:
        row = rng.choice(WORDS["plurals"])
        return from_block(rng, "plural", a=row["word"], b=row["other"])
    thing = names.choose(rng, "things")
    return from_block(rng, "plural", a=thing, b=plural(thing))


def past_form(rng: random.Random) -> Exchange:
    """The past tense of a verb."""
    row = rng.choice(WORDS["pasts"])
    return from_block(rng, "past", a=row["word"], b=row["other"])


def group_name(rng: random.Random) -> Exchange:
    """The word for a group of animals or things."""
    row = rng.choice(WORDS["groups"])
    return from_block(rng, "group", a=row["members"], b=row["group"])


def called(rng: random.Random) -> Exchange:
    """The word for a description."""
    row = rng.choice(WORDS["called"])
    return from_block(rng, "called", a=row["what"], b=row["name"])


def rhyme(rng: random.Random) -> Exchange:
    """A rhyme for a word, two of them, or whether two words rhyme."""
    block = TASKS["rhyme"]
    line, other = rng.sample(RHYMES, 2)
    first, *rest = rng.sample(line, min(3, len(line)))
    kind = rng.random()
    if kind < 0.12:
        return pick(rng, block["check"], a=first, b=rest[0]), f"Yes, {first} and {rest[0]} rhyme."
    stranger = rng.choice(other)
    if kind < 0.24 and not set(line) & set(other) and first[-2:] != stranger[-2:]:
        return pick(rng, block["check"], a=first, b=stranger), f"No, {first} and {stranger} do not rhyme."
    if kind < 0.4 and len(rest) == 2:
        return pick(rng, block["two"], a=first), f"{capital(rest[0])} and {rest[1]} rhyme with {first}."
    return from_block(rng, "rhyme", a=first, b=rest[0])


def spelling(rng: random.Random) -> Exchange:
    """A word letter by letter."""
    word = rng.choice(PLAIN_WORDS)
    return from_block(rng, "spelling", a=word, b="-".join(word))


def misspelled(rng: random.Random) -> Exchange:
    """A word written wrong, and right."""
    row = rng.choice(TABLES["misspelled"])
    return from_block(rng, "misspelled", a=row["wrong"], b=row["right"])


def letter_place(rng: random.Random) -> Exchange:
    """The first, second, third or last letter of a word; for those inside it the word is spelled before."""
    word = rng.choice([one for one in PLAIN_WORDS if len(one) > 3])
    place = rng.choice(["first", "first", "last", "last", "second", "third"])
    letter = word[{"first": 0, "second": 1, "third": 2, "last": -1}[place]].upper()
    question = pick(rng, TASKS["letter"]["ask"], p=place, a=word)
    if place in ("first", "last"):
        return question, f"The {place} letter of {word} is {letter}."
    return question, f"{'-'.join(word)}: the {place} letter is {letter}."


def starts_with(rng: random.Random) -> Exchange:
    """Something of a kind that begins with a letter, or the word of a list that does."""
    words = rng.sample(PLAIN_WORDS, 4)
    if rng.random() < 0.4 and len({word[0] for word in words}) == 4:
        word = rng.choice(words)
        return pick(rng, TASKS["starts"]["choose"], l=word[0].upper(), s=", ".join(words)), f"{capital(word)}."
    row = rng.choice(CATEGORIES)
    word = rng.choice([one for one in row["members"].split(", ") if one.isalpha()])
    return pick(rng, TASKS["starts"]["ask"], one=row["one"], l=word[0].upper()), f"{capital(word)}."


def alphabet(rng: random.Random) -> Exchange:
    """The neighbours of a letter, vowel or consonant, or the letter at a place."""
    block, kind = TASKS["alphabet"], rng.choice(["after", "before", "vowel", "place"])
    at = rng.randrange(1, 25)
    letter = ALPHABET[at]
    if kind in ("after", "before"):
        result = ALPHABET[at + 1 if kind == "after" else at - 1]
        return pick(rng, block["next"], k=kind, a=letter), f"{result} comes {kind} {letter}."
    if kind == "vowel" and letter != "Y":
        what = "a vowel" if letter in "AEIOU" else "a consonant"
        return pick(rng, block["vowel"], a=letter), f"{letter} is {what}."
    place = rng.randrange(12)
    ordinal = facts.ORDINALS[place]
    return pick(rng, block["place"], p=ordinal), f"The {ordinal} letter of the alphabet is {ALPHABET[place]}."


def sorted_words(rng: random.Random) -> Exchange:
    """Three or four words with different first letters in alphabetical order."""
    words = rng.sample(PLAIN_WORDS, rng.choice([3, 3, 4]))
    if len({word[0] for word in words}) < len(words):
        return sorted_words(rng)
    return from_block(rng, "sort", a=", ".join(words), b=", ".join(sorted(words)))


def longest(rng: random.Random) -> Exchange:
    """The longest or shortest of three words that clearly differ."""
    words = sorted(rng.sample(PLAIN_WORDS, 3), key=len)
    if len(words[2]) - len(words[1]) < 2 or len(words[1]) - len(words[0]) < 2:
        return longest(rng)
    kind = rng.choice(["longest", "shortest"])
    listed = ", ".join(rng.sample(words, 3))
    return f"Which word is the {kind}: {listed}?", f"The {kind} word is {words[-1 if kind == 'longest' else 0]}."


def odd_one_out(rng: random.Random) -> Exchange:
    """Three of a kind and one of another."""
    many, one = rng.sample(APART, 2)
    word = rng.choice(facts.members(one))
    listed = rng.sample([*rng.sample(facts.members(many), 3), word], 4)
    return from_block(rng, "odd", a=", ".join(listed), b=word, many=many["many"])


def pick_out(rng: random.Random) -> Exchange:
    """Which of four words is a fruit, a metal and so on."""
    kinds = rng.sample(APART, 4)
    words = [rng.choice(facts.members(row)) for row in kinds]
    return from_block(rng, "which", a=", ".join(rng.sample(words, 4)), b=words[0], one=kinds[0]["one"])


def polite_form(rng: random.Random) -> Exchange:
    """A rude sentence, politely."""
    row = rng.choice(TABLES["rude"])
    holes = {hole: value(rng, hole) for hole in ("object", "food", "day")}
    return pick(rng, TASKS["polite_tasks"]["ask"], s=row["rude"].format(**holes)), row["polite"].format(**holes)


def shorter(rng: random.Random) -> Exchange:
    """A sentence with too many words, and its core: who does what."""
    action, person = rng.choice(TABLES["actions"]), rng.choice(PEOPLE)
    did = f"{action['past']} {action['rest']}"
    first, second = rng.sample(ADJECTIVES, 2)
    who = f"the {first} and {second} {person}"
    if rng.random() < 0.6:
        who = f"the {first}, {second} {person} {rng.choice(WHO_ELSE)}"
    when = rng.choice(WHEN)
    long = f"{capital(when)}, {who} {did}." if rng.random() < 0.5 else f"{capital(who)} {did} {when}."
    return pick(rng, TASKS["shorter"]["ask"], a=long), f"The {person} {did}."


def changed_sentence(rng: random.Random) -> Exchange:
    """A sentence in the past, the future, as a question, with not, or about someone else."""
    action, name = rng.choice(TABLES["actions"]), names.first_name(rng)
    base, third, past, rest = action["base"], action["third"], action["past"], action["rest"]
    now = f"{name} {third} {rest}."
    if rng.random() < 0.2:
        return pick(rng, TASKS["form"]["about"], n=name, a=f"I {base} {rest}."), now
    how, answer = rng.choice([("into the past", f"{name} {past} {rest}."),
                              ("into the past tense", f"{name} {past} {rest}."),
                              ("into the future", f"{name} will {base} {rest}."),
                              ("into a question", f"Does {name} {base} {rest}?"),
                              ("into the negative", f"{name} does not {base} {rest}.")])
    return pick(rng, TASKS["form"]["ask"], how=how, a=now), answer


def corrected(rng: random.Random) -> Exchange:
    """A sentence with a mistake of grammar, and right."""
    action, one = rng.choice(TABLES["actions"]), names.person(rng)
    base, third, past, rest = action["base"], action["third"], action["past"], action["rest"]
    thing = article(names.choose(rng, "things"))
    wrong, right = rng.choice([(f"{one.name} {base} {rest} every day.", f"{one.name} {third} {rest} every day."),
                               (f"They {third} {rest} on Sundays.", f"They {base} {rest} on Sundays."),
                               (f"Last week I {base} {rest}.", f"Last week I {past} {rest}."),
                               (f"{capital(one.he)} don't {base} {rest}.", f"{capital(one.he)} doesn't {base} {rest}."),
                               (f"I has {thing}.", f"I have {thing}."), (f"She have {thing}.", f"She has {thing}."),
                               (f"We was at home with {one.name}.", f"We were at home with {one.name}.")])
    if wrong == right:
        return corrected(rng)
    return from_block(rng, "grammar", a=wrong, b=right)


def scrambled(rng: random.Random) -> Exchange:
    """The words of a sentence out of order, and in order."""
    action = rng.choice(TABLES["actions"])
    whole = f"the {rng.choice(PEOPLE)} {action['third']} {action['rest']}"
    parts = whole.split()
    return pick(rng, TASKS["scrambled"]["ask"], a=" ".join(rng.sample(parts, len(parts)))), f"{capital(whole)}."


def gap(rng: random.Random) -> Exchange:
    """A word for a gap."""
    row = rng.choice(TABLES["gaps"])
    answers = [capital(row["word"]) + ".", row["sentence"].replace("___", row["word"])]
    return pick(rng, TASKS["gap"]["ask"], a=row["sentence"]), rng.choice(answers)


def joined(rng: random.Random) -> Exchange:
    """Two sentences made one."""
    row = rng.choice(TABLES["joins"])
    return pick(rng, TASKS["join"]["ask"], a=f"{row['first']} {row['second']}"), row["one"]


def described(rng: random.Random) -> Exchange:
    """An animal in one sentence, from the table of animals."""
    animals = facts.table_of(facts.RELATIONS["food"])
    row = rng.choice([one for one in animals if one["food"] != "-" and one["home"] != "-"])
    return from_block(rng, "describe", a=row["animal"], **row)


def compared(rng: random.Random) -> Exchange:
    """Which of two things is bigger, faster, heavier or older, or the other way around."""
    word, other = rng.choice(COMPARED)
    chain = rng.choice(TABLES[word])["chain"].split(" < ")
    low, high = sorted(rng.sample(range(len(chain)), 2))
    less, more = chain[low], chain[high]
    first, second = rng.sample([less, more], 2)
    truth = f"{article(more)} is {word} than {article(less)}."
    if rng.random() < 0.5:
        question = pick(rng, TASKS["compare"]["check"], a=first, b=second, w=word)
        return question, f"{'Yes' if first == more else 'No'}, {truth}"
    if rng.random() < 0.3:
        answer = f"{capital(article(less))} is {other} than {article(more)}."
        return pick(rng, TASKS["compare"]["ask"], a=first, b=second, w=other), answer
    return pick(rng, TASKS["compare"]["ask"], a=first, b=second, w=word), capital(truth)


def note(rng: random.Random) -> Exchange:
    """A short message with the names, days and times of the wish."""
    block = TASKS["notes"]
    kind = rng.choice(["thanks", "birthday", "late", "invite", "sick", "meet", "sorry"])
    holes = {"thing": names.choose(rng, "objects"), "name": names.first_name(rng), "who": rng.choice(block["who"]),
             "day": names.choose(rng, "days"), "clock": value(rng, "clock")}
    return pick(rng, block[kind], **holes), pick(rng, block[f"{kind}_text"], **holes)


def copy(rng: random.Random) -> Exchange:
    """A word, a name or a short sentence as it is, twice, in capitals, in small letters."""
    block = TASKS["copies"]
    kind = rng.choices(["say", "twice", "thrice", "upper", "lower"], [45, 12, 15, 18, 10])[0]
    word = rng.choice([names.choose(rng, "things"), names.choose(rng, "colors"), names.first_name(rng),
                       names.made_up(rng), names.town(rng)])
    if kind == "say" and rng.random() < 0.5:
        text = sentence(rng)[1]
        return f"{rng.choice(['Repeat after me', 'Say', 'Copy this', 'Type', 'Repeat'])}: {text}", text
    if kind == "lower":
        word = word.upper()
    answers = {"say": word, "twice": f"{word} {word}", "thrice": f"{word} {word} {word}", "upper": word.upper(),
               "lower": word.lower()}
    return pick(rng, block[kind], x=word), answers[kind]


CASED = {copy, changed_sentence, corrected, joined, misspelled, polite_form, note}     # their text must stay as it is
MAKERS = {sentence: 11, ideas: 7, opposite: 6, synonym: 4, plural_form: 5, past_form: 5, group_name: 2, called: 3,
          rhyme: 5, spelling: 4, misspelled: 2, letter_place: 4, starts_with: 3, alphabet: 3, sorted_words: 4,
          longest: 1, odd_one_out: 2, pick_out: 3, polite_form: 5, shorter: 4, changed_sentence: 4, corrected: 2,
          scrambled: 1, gap: 2, joined: 2, described: 2, compared: 4, note: 4, copy: 5}


def exchange(rng: random.Random) -> Exchange:
    """One task with its answer."""
    kind = rng.random()
    if kind < 0.06:
        return facts.list_talk(rng)[0]
    if kind < 0.09:
        return sums.letters(rng)
    if kind < 0.13:
        return facts.yesno_talk(rng)[0]
    maker = rng.choices(list(MAKERS), list(MAKERS.values()))[0]
    task, answer = maker(rng)
    return (task if maker in CASED else casual(rng, task, typos=0)), answer


def rows(seed: int, n: int) -> Iterator[tuple[str, list[str]]]:
    """n conversations of one to three tasks."""
    rng = random.Random(seed)
    for _ in range(n):
        turns: list[str] = []
        for _ in range(rng.choices([1, 2, 3], [70, 22, 8])[0]):
            turns += exchange(rng)
        yield "task", turns
