"""Values of made-up texts: times, dates, prices, sizes, codes, names, by the name of their kind. Licence: MIT.

`value(rng, "clock")` gives "half past six" or "18:45". Every kind has several ways of writing.
"""
from __future__ import annotations

import random
from typing import Callable

from . import names
from .wording import join_list, number_word

ORDINALS = "first second third fourth fifth sixth seventh eighth ninth tenth".split()
CAUSES = ["a fire", "a flood", "a storm", "an earthquake", "a strike", "heavy snow", "a broken pipe", "a long winter",
          "high rents", "a new road", "a lack of workers", "a power cut", "a fallen tree", "loose stones", "thick fog",
          "a burst tire", "a wedding", "a lost key"]
STREET_ENDS = ["Street", "Street", "Lane", "Road", "Alley", "Avenue", "Square"]


def digits_or_words(rng: random.Random, number: int) -> str:
    """A small number either way."""
    return number_word(number) if number <= 20 and rng.random() < 0.5 else str(number)


def measure(rng: random.Random, units: list[str], low: int = 2, high: int = 90) -> str:
    """A number with one of several units: "12 miles", "seven kg"."""
    return f"{digits_or_words(rng, rng.randrange(low, high))} {rng.choice(units)}"


def number(rng: random.Random) -> str:
    """2 to 79, mostly up to 12."""
    return digits_or_words(rng, rng.choice([rng.randrange(2, 13), rng.randrange(2, 13), rng.randrange(13, 80)]))


def big_number(rng: random.Random) -> str:
    """20 to 9,900."""
    kind = rng.choice(["tens", "hundreds", "thousands"])
    if kind == "tens":
        return str(rng.randrange(20, 100))
    if kind == "hundreds":
        return str(rng.randrange(100, 1000))
    return f"{rng.randrange(10, 100) * 100:,}"


def clock(rng: random.Random) -> str:
    """A time of day."""
    hour, minute = rng.randrange(1, 13), rng.randrange(1, 12) * 5
    word = number_word(hour)
    part = rng.choice(["in the morning", "in the afternoon", "in the evening"])
    return rng.choice([f"{hour}:{minute:02d}", f"{hour}:{minute:02d}", f"{hour} o'clock", f"{word} o'clock",
                       f"half past {word}", f"a quarter to {word}", f"a quarter past {word}", f"{hour} am",
                       f"{hour} pm", f"{word} {part}", f"{hour}:{minute:02d} {part}",
                       f"{rng.randrange(13, 24)}:{minute:02d}", "noon"])


def date(rng: random.Random) -> str:
    """A day of the year."""
    month, day = names.choose(rng, "months"), rng.randrange(1, 29)
    ending = {1: "st", 2: "nd", 3: "rd", 21: "st", 22: "nd", 23: "rd"}.get(day, "th")
    return rng.choice([f"{month} {day}", f"{month} {day}", f"the {day}{ending} of {month}", f"{day} {month}",
                       f"{names.choose(rng, 'days')}, {month} {day}"])


def price(rng: random.Random) -> str:
    """A price below a hundred."""
    whole = rng.choice([rng.randrange(2, 20), rng.randrange(20, 100)])
    part = f"{rng.randrange(1, 20)}.{rng.choice(['50', '20', '80', '95', '25'])}"
    word = digits_or_words(rng, whole)
    return rng.choice([f"{whole} dollars", f"{word} euros", f"{whole} pounds", f"{part} dollars", f"{part} euros",
                       f"${whole}", f"{rng.randrange(5, 100)} cents", f"{word} coins"])


def price_high(rng: random.Random) -> str:
    """A price of hundreds or thousands."""
    return f"{rng.randrange(3, 100) * 50:,} {rng.choice(['dollars', 'euros', 'pounds', 'francs'])}"


def duration(rng: random.Random) -> str:
    """Minutes or hours."""
    hours = rng.randrange(2, 13)
    return rng.choice([f"{digits_or_words(rng, hours)} hours", f"{rng.randrange(1, 12) * 5} minutes", "half an hour",
                       f"{number_word(hours)} and a half hours",
                       f"{hours} hours and {rng.randrange(1, 6) * 10} minutes"])


def duration_long(rng: random.Random) -> str:
    """Days to years."""
    return measure(rng, ["days", "weeks", "months", "years"], high=40)


def length(rng: random.Random) -> str:
    """The length of a thing or an animal."""
    return measure(rng, ["meters", "centimeters", "feet", "inches"])


def height(rng: random.Random) -> str:
    """The height of a building or a hill."""
    return measure(rng, ["meters", "feet"], low=3, high=120)


def distance(rng: random.Random) -> str:
    """How far away."""
    return measure(rng, ["kilometers", "miles", "km"])


def weight(rng: random.Random) -> str:
    """How heavy."""
    return measure(rng, ["kilograms", "grams", "pounds", "kg", "tons"])


def temperature(rng: random.Random) -> str:
    """Degrees of weather or of an oven."""
    if rng.random() < 0.25:
        return f"minus {rng.randrange(2, 50)} degrees"
    return f"{rng.choice([rng.randrange(2, 60), rng.randrange(2, 60), rng.randrange(12, 50) * 5])} degrees"


def score(rng: random.Random) -> str:
    """The result of a game, the winner first."""
    high = rng.randrange(1, 9)
    low = rng.randrange(high)
    return f"{high} to {low}" if rng.random() < 0.6 else f"{high}-{low}"


def platform(rng: random.Random) -> str:
    """Where a train, a bus or a ship stands."""
    kind = rng.choice(["platform", "gate", "pier", "stop", "track"])
    return f"{kind} {rng.choice([rng.randrange(1, 25), *'ABCDEFG'])}"


def room(rng: random.Random) -> str:
    """A room with its number or letter."""
    kind = rng.choice(["room", "room", "hall", "office"])
    return f"{kind} {rng.choice([rng.randrange(1, 50), rng.randrange(100, 400), *'ABCDEF'])}"


def venue(rng: random.Random) -> str:
    """Where people meet."""
    return rng.choice([names.choose(rng, "places"), room(rng), f"the {names.made_up(rng)} hall", "the old school",
                       f"the house of {names.full_name(rng)}", "the blue barn", "the gym", "the tent by the river",
                       f"the cellar of {names.shop_name(rng)}"])


def street(rng: random.Random) -> str:
    """A street, with or without a number."""
    name = names.made_up(rng) if rng.random() < 0.6 else names.choose(rng, "surnames")
    whole = f"{name} {rng.choice(STREET_ENDS)}"
    return whole if rng.random() < 0.6 else f"{rng.randrange(1, 120)} {whole}"


def code(rng: random.Random) -> str:
    """A code or a password."""
    letter, other = rng.choices("ABCDEFGHKLMNPRSTXZ", k=2)
    joined = f"{names.choose(rng, 'colors')}{names.choose(rng, 'things')}".replace(" ", "")
    animal = names.choose(rng, "animals").replace(" ", "")
    return rng.choice([str(rng.randrange(1000, 10000)), f"{letter}{rng.randrange(10, 100)}",
                       f"{letter}{other}-{rng.randrange(100, 1000)}", joined, f"{animal}{rng.randrange(10, 100)}"])


def phone(rng: random.Random) -> str:
    """A phone number that is nobody's."""
    spaced = f"{rng.randrange(200, 999)} {rng.randrange(10, 99)} {rng.randrange(10, 99)}"
    return rng.choice([f"555-{rng.randrange(100, 200):04d}", spaced])


def some_groceries(rng: random.Random) -> str:
    """Two to four things to buy."""
    return join_list(rng.sample(names.entries("groceries"), rng.randrange(2, 5)))


def company(rng: random.Random) -> str:
    """The name of a company."""
    name = names.made_up(rng) if rng.random() < 0.6 else names.choose(rng, "surnames")
    return rng.choice([name, f"{name} and Sons", f"{name} Works", f"{name} Brothers", f"{name} Motors", f"{name} Labs"])


def thing_color(rng: random.Random) -> str:
    """A thing with its color."""
    return f"{names.choose(rng, 'colors')} {names.choose(rng, 'objects')}"


FROM_TABLES = {"animal": "animals", "color": "colors", "day": "days", "drink": "drinks", "food": "foods",
               "girl": "girls", "goods": "goods", "hiding": "hiding", "hobby": "hobbies", "job": "jobs",
               "month": "months", "object": "objects", "pet": "pet_names", "pet_name": "pet_names", "place": "places",
               "shop_thing": "shop_things", "shop_word": "shop_words", "thing": "things"}
KINDS: dict[str, Callable[[random.Random], str]] = {
    "number": number, "big_number": big_number, "clock": clock, "date": date, "price": price,
    "price_high": price_high, "duration": duration, "duration_long": duration_long, "length": length,
    "height": height, "distance": distance, "weight": weight, "temperature": temperature, "score": score,
    "platform": platform, "room": room, "venue": venue, "street": street, "code": code, "phone": phone,
    "list": some_groceries, "company": company, "made_company": company, "thing_color": thing_color,
    "town": names.town, "made_town": names.made_up_town, "made": names.made_up, "shop": names.shop_name,
    "person": names.first_name, "first_name": names.first_name, "full_name": names.full_name,
    "year": lambda rng: str(rng.choice([rng.randrange(1100, 1900), rng.randrange(1900, 2026)])),
    "percent": lambda rng: f"{rng.randrange(1, 100)} percent",
    "age": lambda rng: str(rng.randrange(18, 96)),
    "age_child": lambda rng: str(rng.randrange(3, 15)),
    "shoe_size": lambda rng: str(rng.randrange(34, 48)),
    "two_digits": lambda rng: str(rng.randrange(2, 100)),
    "number_word": lambda rng: number_word(rng.randrange(2, 41)),
    "small_number": lambda rng: digits_or_words(rng, rng.randrange(2, 21)),
    "floor": lambda rng: rng.choice([*ORDINALS[:8], "ground", "top"]),
    "ordinal": lambda rng: rng.choice(ORDINALS),
    "cause": lambda rng: rng.choice(CAUSES),
    "letter": lambda rng: rng.choice("ABCDEFGHJKLMNPQRSTUVWXYZ"),
    "made_small": lambda rng: names.made_up(rng).lower(),
    "hotel_name": lambda rng: f"Hotel {names.made_up(rng)}",
}


def value(rng: random.Random, kind: str) -> str:
    """One value of a kind, as it stands in a text."""
    if kind in FROM_TABLES:
        return names.choose(rng, FROM_TABLES[kind])
    if kind not in KINDS:
        raise KeyError(f"no kind of value '{kind}': {', '.join(sorted([*KINDS, *FROM_TABLES]))}")
    return KINDS[kind](rng)


def different_values(rng: random.Random, kind: str, count: int, own: list[str] | None = None) -> list[str]:
    """`count` values of a kind, or of the list `own`, no two the same and none a part of another one."""
    found: list[str] = []
    for _ in range(200):
        if len(found) == count:
            break
        new = rng.choice(own) if kind == "own" else value(rng, kind)
        if not any(new.lower() in old.lower() or old.lower() in new.lower() for old in found):
            found.append(new)
    return found
