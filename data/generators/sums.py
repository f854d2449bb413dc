"""Sums: + - x / in digits, words and stories, comparing, clock, days, money, letters of a word. Licence: MIT.

`rows(seed, n)` yields ["sums", [user, assistant, ...]]. Every answer is computed, and holds the sum in the form
`a + b = c`, whatever the question's wording: a small model then has one place to learn. Two-digit sums are taken apart
(17 + 25: 17 + 20 = 37, 37 + 5 = 42), so that no step is harder than a two-digit number and a digit, or tens.
The wordings stand in tables/sums.txt.
"""
from __future__ import annotations

import random
from fractions import Fraction
from typing import Iterator

from . import names
from .tables import read_blocks, read_tables
from .wording import capital, casual, join_list, number_word, pick, plural

Exchange = tuple[str, str]
SUMS = read_blocks("sums")
DIRECT = ["plus", "minus", "times", "divided"]
STORIES = ["get", "together", "people", "lose", "off", "more", "change", "cost", "each", "share", "younger", "older"]
SIGN_WORDS = {"+": "plus", "-": "minus", "x": "times", "/": "divided by"}
LEGS = {"dog": 4, "cat": 4, "horse": 4, "cow": 4, "goat": 4, "duck": 2, "hen": 2, "owl": 2, "spider": 8, "ant": 6}
WHEELS = {"bicycle": 2, "car": 4, "tricycle": 3}
UNITS = [("minutes", "hour", 60), ("days", "week", 7), ("months", "year", 12), ("seconds", "minute", 60),
         ("hours", "day", 24), ("eggs", "dozen", 12), ("centimeters", "meter", 100), ("meters", "kilometer", 1000),
         ("feet", "yard", 3), ("grams", "kilogram", 1000), ("cents", "dollar", 100), ("inches", "foot", 12)]
PARTS = [("double", 2, 1), ("twice", 2, 1), ("half of", 1, 2), ("half of", 1, 2), ("triple", 3, 1),
         ("a third of", 1, 3), ("a quarter of", 1, 4), ("three quarters of", 3, 4), ("a tenth of", 1, 10),
         ("a fifth of", 1, 5)]
DAYS = names.entries("days")
LETTER_WORDS = [word for row in read_tables("words")["categories"] for word in row["members"].split(", ")
                if word.isalpha() and word.islower() and 3 <= len(word) <= 10]


def ask(rng: random.Random, block: str, label: str = "ask", /, **values: object) -> str:
    """One wording of a block of sums.txt with its values."""
    return pick(rng, SUMS[block][label], **values)


def compute(a: int, sign: str, b: int) -> int:
    """The result of a sum; a division must have no rest."""
    if sign == "/":
        quotient, rest = divmod(a, b)
        if rest:
            raise ValueError(f"{a} / {b} leaves {rest}")
        return quotient
    return {"+": a + b, "-": a - b, "x": a * b}[sign]


def operands(rng: random.Random, sign: str) -> tuple[int, int]:
    """Two numbers for a sum: more often small ones, never a rest, rarely a result below zero."""
    size = rng.choices([10, 20, 50, 100], [30, 25, 20, 25])[0]
    a, b = rng.randrange(size + 1), rng.randrange(size + 1)
    if sign == "+":
        return (a, b) if a + b <= 150 else operands(rng, sign)
    if sign == "-":
        return (a, b) if a < b and rng.random() < 0.05 else (max(a, b), min(a, b))
    if sign == "x":
        if rng.random() < 0.15:
            return rng.randrange(11, 26), rng.randrange(2, 10)
        return rng.randrange(13), rng.randrange(13)
    divisor = rng.randrange(1, 13)
    return divisor * rng.randrange(13), divisor


def plus_steps(a: int, b: int) -> str:
    """The tens of b first, then its ones: "17 + 20 = 37, 37 + 5 = 42"."""
    tens, ones = b - b % 10, b % 10
    return f"{a} + {tens} = {a + tens}, {a + tens} + {ones} = {a + b}"


def minus_steps(a: int, b: int) -> str:
    """The tens of b first, then its ones: "62 - 20 = 42, 42 - 7 = 35"."""
    tens, ones = b - b % 10, b % 10
    return f"{a} - {tens} = {a - tens}, {a - tens} - {ones} = {a - b}"


def times_steps(a: int, b: int) -> str:
    """The tens of a and its ones each times b, then added: "10 x 6 = 60, 4 x 6 = 24, 60 + 24 = 84"."""
    tens, ones = a - a % 10, a % 10
    return f"{tens} x {b} = {tens * b}, {ones} x {b} = {ones * b}, {tens * b} + {ones * b} = {a * b}"


def needs_steps(a: int, sign: str, b: int) -> bool:
    """Whether a sum is better taken apart than known by heart."""
    if sign == "x":
        return a > 12 and a % 10 != 0
    both_long = a > 10 and b > 10 and b % 10 != 0
    return both_long and (sign == "+" or sign == "-" and a >= b)


def worked(a: int, sign: str, b: int) -> str:
    """The sum with its result, steps before it where they help: "17 + 20 = 37, 37 + 5 = 42. So 17 + 25 = 42."."""
    whole = f"{a} {sign} {b} = {compute(a, sign, b)}."
    if not needs_steps(a, sign, b):
        return whole
    steps = {"+": plus_steps, "-": minus_steps, "x": times_steps}[sign](a, b)
    return f"{steps}. So {whole}"


def direct(rng: random.Random) -> Exchange:
    """A bare sum in one of many wordings."""
    name = rng.choice(DIRECT)
    sign = SUMS[name].settings["sign"]
    a, b = operands(rng, sign)
    question = ask(rng, name, a=a, b=b, A=number_word(a), B=number_word(b))
    if needs_steps(a, sign, b) or rng.random() < 0.7:
        return question, worked(a, sign, b)
    return question, f"{a} {SIGN_WORDS[sign]} {b} is {compute(a, sign, b)}."


def story_numbers(rng: random.Random, sign: str) -> tuple[int, int]:
    """Numbers above one for a story, small ones more often."""
    if sign == "x":
        return rng.randrange(2, 13), rng.randrange(2, 13)
    if sign == "/":
        divisor = rng.randrange(2, 11)
        return divisor * rng.randrange(2, 13), divisor
    size = rng.choice([10, 12, 20, 30, 60])
    a, b = rng.randrange(2, size + 1), rng.randrange(2, size + 1)
    if sign == "-":
        return (max(a, b), min(a, b)) if abs(a - b) > 1 else story_numbers(rng, sign)
    return a, b


def story(rng: random.Random) -> Exchange:
    """A short problem about people and things."""
    name = rng.choice(STORIES)
    sign = SUMS[name].settings["sign"]
    a, b = story_numbers(rng, sign)
    one, friend = names.people(rng, 2)
    values = {"a": a, "b": b, "A": number_word(a), "B": number_word(b), "c": compute(a, sign, b),
              "friend": friend.name, "things": names.choose(rng, "things"), **one.values()}
    ending = "" if rng.random() < 0.2 else " " + ask(rng, name, "tell", **values)
    return ask(rng, name, **values), worked(a, sign, b) + ending


def counted_parts(rng: random.Random) -> Exchange:
    """Legs of animals, wheels of vehicles, minutes in hours: a number times what one of them has."""
    kind = rng.choice(["legs", "wheels", "units", "units"])
    number = rng.randrange(2, 13)
    values: dict[str, object] = {"a": number}
    if kind == "legs":
        values["animal"], each = rng.choice(list(LEGS.items()))
    elif kind == "wheels":
        values["vehicle"], each = rng.choice(list(WHEELS.items()))
    else:
        values["small"], values["big"], each = rng.choice(UNITS)
    question = ask(rng, kind, **values).replace("dozens", "dozen")
    total = number * each
    step = worked(each, "x", number) if needs_steps(each, "x", number) else f"{number} x {each} = {total}."
    return question, f"{step} {ask(rng, kind, 'tell', c=total, **values)}".replace("dozens", "dozen")


def part(rng: random.Random) -> Exchange:
    """Double, half, triple, a third, a quarter of a number."""
    word, top, bottom = rng.choice(PARTS)
    number = bottom * rng.randrange(1, 51 if bottom < 3 else 21)
    question = ask(rng, "part", word=word, n=number)
    if bottom == 1:
        return question, worked(number, "x", top)
    share = number // bottom
    step = f"{number} / {bottom} = {share}."
    return question, step if top == 1 else f"{step} {share} x {top} = {share * top}."


def percent(rng: random.Random) -> Exchange:
    """An easy percentage of a round number."""
    share = rng.choice([10, 20, 25, 50, 50, 75, 100, 1])
    number = rng.randrange(1, 21) * (100 if share == 1 else 20)
    return ask(rng, "percent", p=share, n=number), f"{share}% of {number} is {number * share // 100}."


def comparison(rng: random.Random) -> Exchange:
    """Which of two numbers is bigger, is one of them more than the other."""
    a, b = rng.sample(range(101), 2)
    if rng.random() < 0.5:
        answer = f"Yes, {a} is more than {b}." if a > b else f"No, {a} is less than {b}."
        return ask(rng, "compare", "check", a=a, b=b), answer
    if rng.random() < 0.5:
        word, first, second = rng.choice(["bigger", "larger", "greater", "more"]), max(a, b), min(a, b)
    else:
        word, first, second = rng.choice(["smaller", "less"]), min(a, b), max(a, b)
    return ask(rng, "compare", "which", word=word, a=a, b=b), f"{first} is {word} than {second}."


def who_has_more(rng: random.Random) -> Exchange:
    """Which of two people has more or fewer, is older or younger."""
    a, b = rng.sample(range(2, 60), 2)
    one, two = names.people(rng, 2)
    things = plural(names.choose(rng, "things"))
    state, more, less = rng.choice([(f"has {{}} {things}", f"has more {things}", f"has fewer {things}"),
                                    ("is {} years old", "is older", "is younger"),
                                    ("read {} pages", "read more pages", "read fewer pages")])
    told = f"{one.name} {state.format(a)} and {two.name} {state.format(b)}."
    winner, loser = (one.name, two.name) if a > b else (two.name, one.name)
    if rng.random() < 0.3:
        return f"{told} Who {less}?", f"{min(a, b)} is less than {max(a, b)}. {loser} {less}."
    return f"{told} Who {more}?", f"{max(a, b)} is more than {min(a, b)}. {winner} {more}."


def extremes(rng: random.Random) -> Exchange:
    """The biggest or smallest of some numbers, or all of them in order."""
    numbers = rng.sample(range(100), rng.choice([3, 3, 4]))
    if rng.random() < 0.5:
        word, result = rng.choice([("biggest", max(numbers)), ("smallest", min(numbers)), ("largest", max(numbers))])
        listed = join_list(map(str, numbers), rng.choice(["and", "or"]))
        return ask(rng, "extreme", word=word, l=listed), f"The {word} is {result}."
    down = rng.random() < 0.3
    how = rng.choice(["from big to small", "from the largest to the smallest"] if down else
                     ["from small to big", "from the smallest to the largest", "in order"])
    question = ask(rng, "extreme", "sort", how=how, l=", ".join(map(str, numbers)))
    return question, ", ".join(map(str, sorted(numbers, reverse=down))) + "."


def sequence(rng: random.Random) -> Exchange:
    """What comes next, with the step said."""
    step = rng.choice([1, 2, 2, 3, 4, 5, 5, 10, -1, -2, -5])
    start = rng.randrange(0, 30) if step > 0 else rng.randrange(20, 60)
    shown = [start + step * at for at in range(4)]
    answer = worked(shown[-1], "+" if step > 0 else "-", abs(step))
    return ask(rng, "sequence", s=", ".join(map(str, shown))), f"{answer} The next number is {shown[-1] + step}."


def neighbours(rng: random.Random) -> Exchange:
    """The number before, after or between."""
    number = rng.randrange(1, 100)
    kind = rng.choice(["after", "before", "between"])
    if kind == "between":
        return ask(rng, "neighbour", "between", a=number - 1, b=number + 1), f"It is {number}."
    result = number + 1 if kind == "after" else number - 1
    return ask(rng, "neighbour", "next", k=kind, n=number), f"{result} comes {kind} {number}."


def parity(rng: random.Random) -> Exchange:
    """Even or odd."""
    number = rng.randrange(101)
    word, other = ("odd", "even") if number % 2 else ("even", "odd")
    if rng.random() < 0.4:
        asked = rng.choice([word, other])
        yes = "Yes" if asked == word else "No"
        return ask(rng, "parity", "check", n=number, w=asked), f"{yes}, {number} is {word}."
    return ask(rng, "parity", "which", n=number), f"{number} is {word}."


def counting(rng: random.Random) -> Exchange:
    """Count from one number to another, up, down, or in steps."""
    step = rng.choice([1, 1, 1, -1, 2, 5, 10])
    if abs(step) == 1:
        low = rng.randrange(1, 15)
        numbers = list(range(low, low + rng.randrange(3, 11)))[::step]
        question = ask(rng, "count", "ones", a=numbers[0], b=numbers[-1])
    else:
        numbers = [step * at for at in range(1, rng.randrange(5, 11))]
        question = ask(rng, "count", "steps", w={2: "twos", 5: "fives", 10: "tens"}[step], b=numbers[-1])
    return question, ", ".join(map(str, numbers)) + "."


def writing(rng: random.Random) -> Exchange:
    """A number in words, or words in digits."""
    number = rng.randrange(101) if rng.random() < 0.7 else rng.randrange(1001)
    if rng.random() < 0.5:
        return ask(rng, "writing", "words", n=number), f"{capital(number_word(number))}."
    return ask(rng, "writing", "digits", w=number_word(number)), f"{number}."


def hours_later(rng: random.Random) -> Exchange:
    """The full hour some hours later, past twelve too."""
    hour, more = rng.randrange(1, 13), rng.randrange(1, 8)
    total = hour + more
    wrap = f" {total} - 12 = {total - 12}." if total > 12 else ""
    question = ask(rng, "clock", "hours", h=hour, m=more, unit="hour" if more == 1 else "hours")
    return question, f"{hour} + {more} = {total}.{wrap} It is {(total - 1) % 12 + 1} o'clock."


def minutes_later(rng: random.Random) -> Exchange:
    """The time some minutes later, past the hour too."""
    hour, minute = rng.randrange(1, 13), rng.choice([0, 5, 10, 15, 20, 30, 40, 45])
    later = rng.choice([5, 10, 15, 20, 30, 40, 45])
    total = minute + later
    question = ask(rng, "clock", "minutes", t=f"{hour}:{minute:02d}", l=later)
    if total < 60:
        return question, f"{minute} + {later} = {total}. It is {hour}:{total:02d}."
    over = total - 60
    return question, f"{minute} + {later} = {total}, {total} - 60 = {over}. It is {hour % 12 + 1}:{over:02d}."


def hours_between(rng: random.Random) -> Exchange:
    """How many hours from one time to another."""
    start = rng.randrange(1, 10)
    end = rng.randrange(start + 1, 13)
    hours = end - start
    unit = "hour" if hours == 1 else "hours"
    return ask(rng, "clock", "lasts", a=start, b=end), f"{end} - {start} = {hours}. That is {hours} {unit}."


def days_later(rng: random.Random) -> Exchange:
    """The day of the week some days later or earlier, counted out."""
    at, number = rng.randrange(7), rng.randrange(1, 7)
    days = "1 day" if number == 1 else f"{number} days"
    if rng.random() < 0.3:
        passed = [DAYS[(at - count) % 7] for count in range(1, number + 1)]
        question = ask(rng, "days", "before", days=days, d=DAYS[at])
        return question, f"Counting back: {', '.join(passed)}. It was {passed[-1]}."
    passed = [DAYS[(at + count) % 7] for count in range(1, number + 1)]
    return ask(rng, "days", "later", days=days, d=DAYS[at]), f"Counting on: {', '.join(passed)}. It is {passed[-1]}."


def cents(rng: random.Random) -> Exchange:
    """Change from a dollar."""
    price = rng.randrange(1, 20) * 5
    question = ask(rng, "cents", t=names.choose(rng, "things"), p=price)
    return question, f"A dollar is 100 cents. {worked(100, '-', price)}"


def three_terms(rng: random.Random) -> Exchange:
    """Three numbers in one sum."""
    a, b, c = (rng.randrange(1, 21) for _ in range(3))
    sign = rng.choice("+-") if a + b >= c else "+"
    question = ask(rng, "three", a=a, b=b, c=c, s=sign, w=SIGN_WORDS[sign])
    return question, f"{a} + {b} = {a + b}, {a + b} {sign} {c} = {compute(a + b, sign, c)}."


def average(rng: random.Random) -> Exchange:
    """The average of two numbers with an even sum."""
    a = rng.randrange(1, 31)
    b = a + 2 * rng.randrange(1, 11)
    return ask(rng, "average", a=a, b=b), f"{a} + {b} = {a + b}, {a + b} / 2 = {(a + b) // 2}."


def power(rng: random.Random) -> Exchange:
    """Squares and square roots of small numbers."""
    number = rng.randrange(1, 13)
    square = number * number
    if rng.random() < 0.5:
        return ask(rng, "power", "square", n=number), f"{number} x {number} = {square}."
    return ask(rng, "power", "root", n=square), f"The square root of {square} is {number}."


def area(rng: random.Random) -> Exchange:
    """Area of a rectangle, perimeter of a square or a triangle."""
    a, b = rng.randrange(2, 13), rng.randrange(2, 13)
    if rng.random() < 0.5:
        return ask(rng, "area", a=a, b=b), f"{a} x {b} = {a * b}. The area is {a * b} square meters."
    shape, sides = rng.choice([("square", 4), ("triangle with three equal sides", 3)])
    around = sides * a
    return ask(rng, "area", "around", shape=shape, a=a), f"{sides} x {a} = {around}. The perimeter is {around} cm."


def with_rest(rng: random.Random) -> Exchange:
    """A division with a rest."""
    b, c = rng.randrange(2, 11), rng.randrange(1, 11)
    rest = rng.randrange(1, b)
    a = b * c + rest
    return ask(rng, "rest", a=a, b=b), f"{b} x {c} = {b * c}, and {rest} is left. So {a} / {b} = {c}, rest {rest}."


def decimals(rng: random.Random) -> Exchange:
    """Halves: 2.5 + 1.5."""
    low, high = sorted(Fraction(rng.randrange(1, 20), 2) for _ in range(2))
    sign = rng.choice("+-")
    a, b, c = (f"{float(number):g}" for number in (high, low, high + low if sign == "+" else high - low))
    return ask(rng, "decimals", a=a, b=b, s=sign), f"{a} {sign} {b} = {c}."


def letters(rng: random.Random) -> Exchange:
    """How many letters a word has, or how often one of them; the word is spelled first."""
    word = rng.choice(LETTER_WORDS)
    spelled = "-".join(word)
    if rng.random() < 0.7:
        return ask(rng, "letters", "all", w=word), f"{spelled}: {len(word)} letters."
    letter = rng.choice(word)
    number = word.count(letter)
    times = {1: "once", 2: "twice"}.get(number, f"{number} times")
    return ask(rng, "letters", "one", w=word, l=letter), f"{spelled}: {letter} stands there {times}."


def numbered(parts: list[str]) -> str:
    """Things with their numbers: "red 1, blue 2"."""
    return ", ".join(f"{one} {at}" for at, one in enumerate(parts, 1))


def word_count(rng: random.Random) -> Exchange:
    """How many words a short sentence has, each with its number."""
    sentence = ask(rng, "words", "sentence", thing=names.choose(rng, "things"), name=names.first_name(rng))
    parts = sentence.split(" ")
    return ask(rng, "words", s=sentence), f"{numbered(parts)}: {len(parts)} words."


def thing_count(rng: random.Random) -> Exchange:
    """How many things a list has."""
    things = rng.sample(names.entries("groceries"), rng.randrange(2, 7))
    return ask(rng, "things", l=join_list(things)), f"{numbered(things)}. That is {len(things)} things."


def follow_up(rng: random.Random) -> list[Exchange]:
    """A sum, and then one or two more with its result."""
    a, b = rng.randrange(1, 31), rng.randrange(1, 31)
    talk = [(ask(rng, "plus", a=a, b=b, A=number_word(a), B=number_word(b)), worked(a, "+", b))]
    total = a + b
    for _ in range(rng.choice([1, 1, 2])):
        kind = rng.choice(["plus", "minus", "double"] if total <= 60 else ["plus", "minus"])
        number = 2 if kind == "double" else rng.randrange(min(total, 10) + 1)
        sign = {"plus": "+", "minus": "-", "double": "x"}[kind]
        talk.append((ask(rng, "more_sums", kind, n=number), worked(total, sign, number)))
        total = compute(total, sign, number)
    return talk


SINGLE = {direct: 42, story: 22, counted_parts: 4, part: 5, percent: 2, comparison: 4, who_has_more: 2, extremes: 3,
          sequence: 3, neighbours: 2, parity: 2, counting: 2, writing: 2, hours_later: 1.5, minutes_later: 1.5,
          hours_between: 1, days_later: 2, cents: 1, three_terms: 3, average: 1, power: 1, area: 1, with_rest: 1,
          decimals: 1, letters: 3, word_count: 1, thing_count: 1}


def exchange(rng: random.Random) -> Exchange:
    """One question with its answer."""
    return rng.choices(list(SINGLE), list(SINGLE.values()))[0](rng)


def rows(seed: int, n: int) -> Iterator[tuple[str, list[str]]]:
    """n conversations of one to three exchanges."""
    rng = random.Random(seed)
    for _ in range(n):
        if rng.random() < 0.08:
            talk = follow_up(rng)
        else:
            talk = [exchange(rng) for _ in range(rng.choices([1, 2, 3], [70, 20, 10])[0])]
        turns: list[str] = []
        for question, answer in talk:
            turns += [casual(rng, question, typos=0), answer]
        yield "sums", turns
