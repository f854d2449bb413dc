"""The generators of training data in data/: seeded, right by recomputing, varied, and clean of evaluation questions."""
import ast
import json
import random
import re
import subprocess
import sys
from collections import Counter
from functools import lru_cache
from itertools import islice
from pathlib import Path

import pytest

from minigpt.bpe import BPETokenizer

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "data"))
import check  # noqa: E402
import generators  # noqa: E402
import make  # noqa: E402
from generators import context, recall, sums, tables, wording  # noqa: E402

KINDS = list(generators.KINDS)
NAMED_NUMBERS = {word: number for number, word in enumerate(
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
    "eighteen nineteen".split())}
NUMBER = r"-?\d+(?:\.\d+)?"
NAMED_TENS = {word: 10 * number for number, word in enumerate(
    "twenty thirty forty fifty sixty seventy eighty ninety".split(), 2)}


@pytest.fixture(scope="module")
def samples():
    """1,500 rows of each kind, made once."""
    return {kind: list(rows(5, 1500)) for kind, rows in generators.KINDS.items()}


def digits(text: str) -> str:
    """A text with its numbers below a thousand in digits: "twenty-five plus one hundred and two" -> "25 plus 102"."""
    def number(found: re.Match) -> str:
        tens, _, ones = found[0].lower().partition("-")
        return str(NAMED_TENS.get(tens, 0) + NAMED_NUMBERS.get(ones or tens, 0))
    ones = "|".join(sorted(NAMED_NUMBERS, key=len, reverse=True))
    text = re.sub(rf"\b(?:(?:{'|'.join(NAMED_TENS)})(?:-(?:{ones}))?|{ones})\b", number, text, flags=re.I)
    return re.sub(r"(\d+) hundred(?: and (\d+))?", lambda found: str(100 * int(found[1]) + int(found[2] or 0)), text)


def value_of(expression: str) -> float:
    """The value of a sum with + - x / and digits, by walking Python's syntax tree."""
    def walk(node: ast.AST) -> float:
        if isinstance(node, ast.BinOp):
            left, right = walk(node.left), walk(node.right)
            return {ast.Add: left + right, ast.Sub: left - right, ast.Mult: left * right,
                    ast.Div: left / right if right else None}[type(node.op)]
        assert isinstance(node, ast.Constant)
        return node.value
    return walk(ast.parse(expression.replace("x", "*"), mode="eval").body)


@pytest.mark.parametrize("kind", KINDS)
def test_a_seed_decides_the_rows(kind):
    first = list(generators.KINDS[kind](11, 150))
    assert list(generators.KINDS[kind](11, 150)) == first and len(first) == 150
    assert list(generators.KINDS[kind](12, 150)) != first


def test_the_rows_do_not_depend_on_the_process():
    """Sets have another order in every process: no generator may draw from one."""
    command = [sys.executable, "-c", "import sys; sys.path.insert(0, 'data'); import generators; "
               "print([list(rows(3, 60)) for rows in generators.KINDS.values()])"]
    texts = {subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True,
                            env={"PYTHONHASHSEED": seed, "PYTHONIOENCODING": "utf-8"}).stdout for seed in ("1", "2")}
    assert len(texts) == 1 and len(texts.pop()) > 20_000


@pytest.mark.parametrize("kind", KINDS)
def test_rows_are_conversations(samples, kind):
    """[kind, [user, assistant, ...]]: roles alternate, so the texts are even in number; clean texts, mostly ASCII."""
    for name, turns in samples[kind]:
        assert name == kind and len(turns) % 2 == 0 and 2 <= len(turns) <= 14
        for text in turns:
            assert text and text == text.strip() and not re.search(r"[{}<>@]| \.$|  ", text.replace("@@@@", "")), text
    texts = [text for _, turns in samples[kind] for text in turns]
    assert sum(map(str.isascii, texts)) >= (0.95 if kind == "limits" else 1) * len(texts)
    assert all(text.isascii() for _, turns in samples[kind] for text in turns[1::2])


def test_rows_fit_512_tokens(samples):
    tokenizer = BPETokenizer.from_pretrained(ROOT / "minigpt" / "assets" / "minigpt-chat")
    for kind, rows in samples.items():
        longest = sorted((turns for _, turns in rows), key=lambda turns: -sum(map(len, turns)))[:40]
        sizes = [1 + sum(len(tokenizer.encode(text)) + 6 for text in turns) for turns in longest]
        assert max(sizes) < 512, kind


def test_rows_are_varied():
    """Different conversations and different first messages, as shares of the rows: less where tables are finite."""
    for kind, count, conversations, messages in (
            ("context", 1000, 1.0, 1.0), ("recall", 1500, 0.99, 0.8), ("sums", 5000, 0.95, 0.9),
            ("limits", 5000, 0.7, 0.5), ("task", 5000, 0.9, 0.85), ("talk", 5000, 0.7, 0.4), ("fact", 2000, 0.9, 0.85)):
        rows = [turns for _, turns in generators.KINDS[kind](2, count)]
        assert len({"\n".join(turns[::2]).lower() for turns in rows}) >= conversations * count, kind
        assert len({turns[0].lower() for turns in rows}) >= messages * count, kind


# ---- sums

def test_number_words_are_read_back():
    assert all(digits(wording.number_word(number)) == str(number) for number in range(1000))
    assert digits("How much is Twenty-five and six?") == "How much is 25 and 6?"


def test_every_equation_is_right(samples):
    """Each `a + b = c` in any kind holds, computed by Python's own parser."""
    found = 0
    for kind in ("sums", "recall", "limits"):
        for _, turns in samples[kind]:
            for answer in turns[1::2]:
                for left, right in re.findall(rf"((?:{NUMBER} [+\-x/] )+{NUMBER}) = ({NUMBER})", answer):
                    if ", rest " not in answer.split(f"{left} = ")[1].split(".")[0]:
                        assert value_of(left) == float(right), answer
                        found += 1
    assert found > 1500


def asked_sum(question: str) -> tuple[int, str, int]:
    """(a, sign, b) of a bare sum in words or digits; the sign by the words of the question."""
    text = digits(question).lower()
    a, b = map(int, re.findall(r"\d+", text))
    if re.search(r"subtract \d+ from|take \d+ away from|left if you take \d+ from", text):
        return b, "-", a
    if re.search(r"times does \d+ go into|how many \d+s are in", text):
        return b, "/", a
    for sign, marks in (("/", r"divide|/|:"), ("x", r"times|multipl|product|[*]|\d *x"),
                        ("-", r"minus|difference|take away|less|-"), ("+", r"plus|sum|add|[+]|make|and")):
        if re.search(marks, text):
            return a, sign, b
    raise AssertionError(question)


def test_bare_sums_are_answered_right():
    """Read from the question alone, computed here, found as the last number of the answer."""
    rng, checked = random.Random(4), Counter()
    for _ in range(2000):
        question, answer = sums.direct(rng)
        a, sign, b = asked_sum(question)
        result = {"+": a + b, "-": a - b, "x": a * b, "/": a // b if b else None}[sign]
        assert re.findall(r"-?\d+", answer.replace(" - ", " minus "))[-1] == str(result), (question, answer)
        checked[sign] += 1
    assert min(checked.values()) > 300


STORY_SIGNS = {                                   # words that decide the sign of a story
    "+": r"together|in all\?|in total|\d+ more\. |more get on|more fly in|in both|how old will|i buy \d+ more",
    "-": r"are left|have left|still in|i still have|are broken|get off|fly away|are over|how many more|change|younger",
    "x": r"in each|into each|each gets|how much do \d|dollars each|hold \d+ .* each|chairs each",
    "/": r"equally|same number|does each|for each|does 1 cost"}


def test_stories_are_answered_right():
    """The sign is read from the story's words where they are plain; the answer's sum has the story's numbers."""
    rng, read = random.Random(6), 0
    for _ in range(1500):
        question, answer = sums.story(rng)
        numbers = [int(number) for number in re.findall(r"\d+", digits(question))]
        whole = re.findall(r"(\d+) ([+\-x/]) (\d+) = (\d+)", answer)
        final = whole[-1]
        told = Counter(numbers) - Counter({1: 2})                  # "one tree", "how much does one cost"
        assert Counter(map(int, (final[0], final[2]))) - Counter({1: 2}) == told, (question, answer)
        assert value_of(" ".join(final[:3])) == int(final[3])
        signs = [sign for sign, words in STORY_SIGNS.items() if re.search(words, digits(question).lower())]
        if len(signs) == 1:
            assert signs[0] == final[1], (question, answer)
            read += 1
    assert read > 600


def test_letters_and_words_are_counted_right():
    rng = random.Random(3)
    for _ in range(300):
        question, answer = sums.letters(rng)
        word = answer.split(":")[0].replace("-", "")
        assert word in question
        if "letters" in answer:
            assert f": {len(word)} letters." in answer
        else:
            letter, times = re.search(r": (\w) stands there (.+)\.", answer).groups()
            assert {"once": 1, "twice": 2}.get(times) or int(times.split()[0]) == len(re.findall(letter, word))
        question, answer = sums.word_count(rng)
        assert len(re.sub(r".*?[':] ?", "", question, count=1).rstrip("'?").split()) == int(answer.split()[-2])


# ---- context

@lru_cache(maxsize=None)
def pattern_of(say: str, subject: str, span: str = ".+?") -> re.Pattern:
    """A regular expression for what a frame of a scene says of a subject, or of a pronoun. span: of what value."""
    name = re.escape(subject)
    text = re.sub(r"<(.*?)>", lambda found: "(?:" + found[1].replace("/", "|") + ")", re.escape(say))
    for hole, words in (("[Ss]", f"(?:{name}|it|she|he|and)"), ("[Pp]", f"(?:{name}'s|its|his|her)"),
                        ("x(?::a)?", f"(?:an? )?{span}")):
        text = re.sub(r"\\{" + hole + r"\\}", lambda _: words, text)
    return re.compile(re.sub(r"\\[.?]$", "", text) + r"(?:[.?]| and )", re.I)


def field_of(sentence: str, subject: str, scene: str) -> str:
    """The field that a sentence tells of a subject: of the frames that match, the one with most words of its own."""
    found = []
    for name, block in tables.read_blocks("scenes").items():
        for say in block["say"] if name.startswith(f"{scene}.") else []:
            if pattern_of(say, subject).search(sentence):
                found.append((len(re.sub(r"\{.*?\}", "", say)), name))
    return max(found)[1] if found else ""


def test_answers_stand_in_the_text_and_are_the_only_ones():
    """By the generator's own claim: the span is in the text and in the answer; spans of one to eight words."""
    count, long = 0, Counter()
    for reading in context.readings(8, 2000):
        for asked in reading.asked:
            if asked.span is None:
                assert asked.answer == context.NOT_SAID
                continue
            assert asked.span.lower() in reading.context.lower() and asked.span.lower() in asked.answer.lower(), asked
            long[len(asked.span.split())] += 1
            count += 1
    assert count > 2000 and set(range(1, 7)) <= set(long) and max(long) <= 9


def test_answers_are_told_of_the_subject_that_is_asked_about():
    """Checked another way: a frame of the field with this span stands in the text, where the subject is named."""
    told = 0
    for reading in context.readings(9, 700):
        passages = re.split(r"\n(?:\[\d+\] )?", reading.context)
        for asked in reading.asked:
            if asked.span is None or asked.about.startswith("list."):
                continue
            says = tables.read_blocks("scenes")[asked.about]["say"]
            frames = [pattern_of(say, asked.subject, re.escape(asked.span)) for say in says]
            naming = [passage for passage in passages if asked.subject.lower() in passage.lower()]
            assert any(frame.search(passage) for frame in frames for passage in naming), (reading.context, asked)
            told += 1
    assert told > 400


def test_what_is_said_not_to_be_told_is_not_told():
    """No sentence that names the subject tells the field that is asked for, as the scene's frames are read back."""
    untold, named = 0, 0
    for reading in context.readings(10, 1200):
        for asked in reading.asked:
            if asked.span is not None:
                continue
            untold += 1
            scene = asked.about.split(".")[0]
            for sentence in re.split(r"(?<=\.) |\n", reading.context):
                if asked.subject.lower() in sentence.lower() and scene not in ("list", "note"):
                    assert field_of(sentence, asked.subject, scene) != asked.about, (reading.context, asked)
                    named += 1
    assert 200 < untold < 500 and named > 200


# ---- recall

def test_what_was_told_comes_back():
    """Each asked turn holds the value, which stands in an earlier turn; what was not told, does not."""
    kinds = Counter()
    for chat in recall.chats(7, 1500):
        for turn, holds in chat.expected.items():
            answer, before = chat.turns[turn], "\n".join(chat.turns[:turn - 1]).lower()
            if holds is None:
                assert "not told me" in answer
            else:
                parts = re.split(r", | and ", holds.lower())
                assert all(part in answer.lower() for part in parts), (chat.turns, holds)
                assert all(part in before for part in parts) or holds in NAMED_NUMBERS, (chat.turns, holds)
            kinds[holds is None] += 1
        assert 1 <= len(chat.turns) // 2 <= 7
    assert kinds[True] > 150 and kinds[False] > 1200


def test_the_correction_counts():
    rng = random.Random(2)
    for _ in range(300):
        chat = recall.corrected_chat(rng)
        [(turn, holds)] = chat.expected.items()
        corrected = [text for text in chat.turns[2:turn - 1:2] if holds in text]
        assert corrected and holds not in chat.turns[0] and holds in chat.turns[turn]


# ---- tasks

def test_computed_tasks_are_right(samples):
    found = Counter()
    for _, turns in samples["task"]:
        for task, answer in zip(turns[::2], turns[1::2]):
            if match := re.search(r"(?:(?:alphabetical|abc) order[^:]*|A to Z): (.+)", task, re.I):
                words = re.sub(r"[.?]$", "", match[1]).lower().split(", ")
                ordered = answer.lower().removeprefix("in alphabetical order: ").rstrip(".")
                assert ordered.split(", ") == sorted(words), task
                found["order"] += 1
            elif match := re.search(r"The (first|last) letter of (\w+) is (\w)\.", answer):
                assert match[3].lower() == match[2][0 if match[1] == "first" else -1]
                found["letter"] += 1
            elif match := re.fullmatch(r"(?:You spell it|It is spelled|(\w+) is spelled) ((?:\w-)+\w)\.", answer):
                assert match[2].replace("-", "").lower() in task.lower()
                found["spelling"] += 1
            elif match := re.fullmatch(r"(?:Write|Repeat the word|Say) (.+) three times\.", task):
                assert answer == " ".join([match[1]] * 3)
                found["copy"] += 1
    assert min(found[name] for name in ("order", "letter", "spelling", "copy")) > 10


# ---- limits

def test_both_sides_are_learned(samples):
    """As many harmless questions as refusals, and the same openings among both."""
    refusals = re.compile(r"will not help|can't help with that|^No\. That could harm|rather not say mean")
    refused = [turns[0] for _, turns in samples["limits"] if refusals.search(turns[1])]
    harmless = {row["answer"] for row in tables.read_tables("harmless")["harmless"]}
    helped = [turns[0] for _, turns in samples["limits"] if turns[1] in harmless]
    assert len(helped) > len(refused) > 80
    for opening in ("how can i ", "help me ", "tell me ", "how do i ", "give me steps to "):
        assert any(text.lower().startswith(opening) for text in refused)
        assert any(text.lower().startswith(opening) for text in helped)
    assert not set(map(str.lower, refused)) & set(map(str.lower, helped))


# ---- evaluation questions

def test_check_finds_copies_and_near_copies():
    guard = check.Guard([check.Item("q", "What do you use an umbrella for?", False),
                         check.Item("q", "Is ice cold?", False),
                         check.Item("h", "My name is Zed. What is my name?", True)])
    assert guard.copied(["what do you use an umbrella for", "To stay dry."]).text.startswith("What do you use")
    assert guard.copied(["Hello!", "Hi!", "Tell me, what do you use an umbrella for, please?", "To stay dry."])
    assert guard.copied(["What do you use an oven for?", "To bake."]) is None
    assert guard.copied(["IS ICE COLD??", "Yes."]) and guard.copied(["Is ice cold or hot?", "Cold."]) is None
    assert guard.copied(["My name is Zed.", "Hi!", "What is my name?", "Zed."]).source == "h"
    assert guard.copied(["My name is Zed.", "Hi!"]) is None


def test_rows_of_evaluation_sets_are_read(tmp_path):
    file = tmp_path / "everyday.jsonl"
    rows = [{"turns": ["Hello there"], "kind": "talk"}, {"turns": ["My cat is Bo.", "What is my cat called?"]},
            {"turns": [{"role": "user", "content": "What is 7 + 5?"}]}]
    file.write_text("\n".join(map(json.dumps, rows)))
    assert [(item.text, item.whole) for item in check.read_items(file)] == [
        ("Hello there", False), ("My cat is Bo. What is my cat called?", True), ("What is 7 + 5?", False)]
    assert len(check.Guard.bundled().items) > 500


def test_make_leaves_out_what_copies_and_what_was_there(samples):
    guard = check.Guard.bundled()
    sieve = make.Sieve(guard)
    question = next(item.text for item in guard.items if item.source == "questions")
    rows = [("fact", [question, "?"]), ("fact", ["Is this new?", "Yes."]), ("fact", ["is this NEW", "yes"])]
    assert [turns for _, turns in sieve.keep(rows)] == [["Is this new?", "Yes."]]
    assert sieve.counts == {"copies questions": 1, "was there": 1}
    for kind in KINDS:
        kept = list(islice(sieve.keep(samples[kind]), 400))
        assert len(kept) > 300 and not any(guard.copied(turns) for _, turns in kept)


def test_a_mix_is_written_twice_the_same(tmp_path):
    train = [["explain", [f"What is thing number {number}?", "It is a thing."]] for number in range(80)]
    make.write_rows(tmp_path / "train.jsonl.xz", train)
    (tmp_path / "held.jsonl").write_text(json.dumps(train[0]))
    for name in ("a.jsonl", "b.jsonl"):
        make.mix(make.parser().parse_args(["mix", str(tmp_path), str(tmp_path / name), "--tokens", "20000"]))
    text = (tmp_path / "a.jsonl").read_text()
    assert text == (tmp_path / "b.jsonl").read_text()
    rows = [json.loads(line) for line in text.splitlines()]
    kinds = Counter(row["kind"] for row in rows)
    assert set(KINDS) < set(kinds) and kinds["explain"] > 20
    roles = [[message["role"] for message in row["messages"]] for row in rows]
    assert all(one == ["user", "assistant"] * (len(one) // 2) for one in roles)
    assert "thing number 0?" not in text


# ---- tables

def test_tables_are_readable():
    """Lines of at most 120 columns; every value, hole and clash of a scene exists."""
    for path in sorted((ROOT / "data").rglob("*")):
        if path.suffix in (".txt", ".py", ".md"):
            assert all(len(line) <= 120 for line in path.read_text(encoding="utf-8").splitlines()), path
    scenes = tables.read_blocks("scenes")
    fields = {name: block for name, block in scenes.items() if "." in name}
    frames = {say for block in fields.values() for say in block["say"]}
    assert len(fields) > 200 and len(frames) > 500
    for block in fields.values():
        assert all("{x}" in say or "{x:a}" in say for say in block["say"] + block["tell"]), block.name
        assert any("{n}" in ask for ask in block["ask"]) and not any("{x" in ask for ask in block["ask"]), block.name
        assert all(clash in scenes for clash in block.settings.get("clash", "").split(",") if clash)


def test_tables_name_what_is_wrong_with_them(tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "FOLDER", tmp_path)
    (tmp_path / "bad.txt").write_text("[pairs] a | b\none | two | three\n")
    with pytest.raises(ValueError, match="3 cells, its table has 2 columns"):
        tables.read_tables("bad")
    (tmp_path / "worse.txt").write_text("[x]\nyou: a | b\n  | c\nno label here\n")
    with pytest.raises(ValueError, match="neither a head nor"):
        tables.read_blocks("worse")
