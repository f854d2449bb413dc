"""Names of people, towns and shops: known ones, and made-up ones from syllables. Licence: MIT."""
from __future__ import annotations

import random
from dataclasses import dataclass

from .tables import read_tables
from .wording import capital

TABLES = read_tables("names")


@dataclass(frozen=True)
class Person:
    """A name with its pronouns."""

    name: str
    he: str
    him: str
    his: str

    def values(self) -> dict[str, str]:
        """The name and pronouns as values of a template."""
        return {"name": self.name, "he": self.he, "him": self.him, "his": self.his, "He": capital(self.he),
                "His": capital(self.his)}


def choose(rng: random.Random, table: str) -> str:
    """One entry of a table of names.txt: "towns", "things", "jobs" and so on."""
    return next(iter(rng.choice(TABLES[table]).values()))


def entries(table: str) -> list[str]:
    """All entries of a table of names.txt."""
    return [next(iter(row.values())) for row in TABLES[table]]


def made_up(rng: random.Random) -> str:
    """A name that is most likely nobody's: pieces of names joined, or free syllables."""
    if rng.random() < 0.6:
        return choose(rng, "starts") + choose(rng, "middles") + choose(rng, "ends")
    syllables = [choose(rng, "onsets") + choose(rng, "vowels") for _ in range(rng.choice([1, 2, 2, 3]))]
    name = "".join(syllables) + choose(rng, "codas")
    return capital(name)


def first_name(rng: random.Random) -> str:
    """A first name of any language, or a made-up one."""
    return person(rng).name


def person(rng: random.Random, invented: float = 0.2) -> Person:
    """A person. invented: the share of made-up names."""
    girl = rng.random() < 0.5
    if rng.random() < invented:
        name = made_up(rng)
    else:
        name = choose(rng, "girls" if girl else "boys")
    return Person(name, "she", "her", "her") if girl else Person(name, "he", "him", "his")


def people(rng: random.Random, number: int) -> list[Person]:
    """Persons with different names."""
    found: dict[str, Person] = {}
    while len(found) < number:
        one = person(rng)
        found[one.name] = one
    return list(found.values())


def full_name(rng: random.Random) -> str:
    """A first and a last name, now and then with a title."""
    last = choose(rng, "surnames") if rng.random() < 0.7 else made_up(rng)
    if rng.random() < 0.2:
        return f"{rng.choice(['Mr.', 'Mrs.', 'Dr.', 'Ms.', 'Professor'])} {last}"
    return f"{first_name(rng)} {last}"


def made_up_town(rng: random.Random) -> str:
    """A town that is on no map: a syllable or two with an ending of towns."""
    if rng.random() < 0.5:
        return made_up(rng)
    start = choose(rng, "onsets") + choose(rng, "vowels") + choose(rng, "codas")
    return capital(start + choose(rng, "town_ends"))


def town(rng: random.Random, invented: float = 0.5) -> str:
    """A town. invented: the share of made-up ones."""
    return made_up_town(rng) if rng.random() < invented else choose(rng, "towns")


def shop_name(rng: random.Random) -> str:
    """The name of a shop, a café or an inn."""
    if rng.random() < 0.5:
        return f"the {choose(rng, 'shop_words')} {choose(rng, 'shop_things')}"
    owner = first_name(rng) if rng.random() < 0.5 else made_up(rng)
    return f"{owner}'s {rng.choice(['Shop', 'Store', 'Bakery', 'Books', 'Kitchen', 'Garden', 'Workshop', 'Cafe'])}"
