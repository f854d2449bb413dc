"""Structured output: patterns against Python's re, tokens against every token tried, JSON against jsonschema."""
import json
import random
import re
from collections import Counter

import jsonschema
import pytest
import torch

from exercise_cells import NBS, exercises, said
from minigpt.deeper import constrained
from minigpt.deeper.beam_search import beam_search
from minigpt.deeper.constrained import (NOTHING, RegexConstraint, choice, choice_constraint, derive, json_constraint,
                                        may_end, one_of, repeat, sequence)
from minigpt.deeper.speculative import NGramDraft, speculate
from minigpt.engine.automaton import Automaton, trie_of
from minigpt.chat_format import ChatRenderer
from minigpt.engine.console import error_of
from minigpt.engine.dataset_readers import load_chats, load_text
from minigpt.engine.json_schema import json_schema_pattern
from minigpt.engine.regex import parse_regex
from minigpt.engine.tokenizer import Tokenizer
from minigpt.generation import Options, generate
from minigpt.gpt2 import GPT2, GPT2Config

pytestmark = pytest.mark.usefixtures("one_thread")  # single tokens: threads would mostly wait for each other


@pytest.fixture(scope="module")
def model():
    return GPT2.from_pretrained()


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.from_pretrained()


@pytest.fixture(scope="module")
def prompts(tokenizer):
    renderer = ChatRenderer(tokenizer)
    return [renderer.prompt([{"role": "user", "content": chat["messages"][0]["content"][:60]}])
            for chat in load_chats("held")[:4]]


@pytest.fixture(scope="module")
def small():
    """A tokenizer of 400 ids and a random model of no size, which says anything; the last id ends a text."""
    tokenizer = Tokenizer.train([*load_text()[:100], '{"a": [1, 2.5], "b": "cat", "c": null}'] * 2, 400, ["<|end|>"])
    torch.manual_seed(0)
    model = GPT2(GPT2Config(vocab_size=400, block_size=2048, n_layer=1, n_head=1, n_embd=8)).eval()
    with torch.no_grad():
        model.wte.weight.mul_(20)
    return model, tokenizer, [tokenizer.special_tokens["<|end|>"]]


def fits(pattern, text):
    for byte in text.encode() if isinstance(text, str) else text:
        pattern = derive(pattern, byte)
    return may_end(pattern)


# ------------------------------------------------------------------ patterns

def random_pattern(rng, depth=0):
    kind = rng.randrange(9 if depth < 3 else 4)
    if kind < 3:
        return rng.choice(["a", "b", "é", r"\d", "[ab]", "[^a]", ".", r"\w", "[a-b1]", r"\s", r"\.", "[^\\d\\n]", "😀"])
    if kind == 3:
        return rng.choice(["a", "b", "1"]) + rng.choice(["*", "+", "?", "{2}", "{1,3}", "{2,}", "{0,1}"])
    inner = [random_pattern(rng, depth + 1) for _ in range(rng.randrange(1, 4))]
    if kind < 6:
        return "".join(inner)
    body = ("(" if kind < 8 else "(?:") + "|".join(inner) + ")"
    return body + rng.choice(["", "", "*", "+", "?", "{1,2}"])


def test_regex_equals_pythons():
    """By derivatives one at a time, and by the table."""
    rng, seen = random.Random(0), Counter()
    for _ in range(400):
        pattern = random_pattern(rng)
        parsed = parse_regex(pattern)
        automaton = Automaton(parsed)
        for _ in range(12):
            text = "".join(rng.choices("ab1é😀. \n", k=rng.randrange(6)))
            want = re.fullmatch(pattern, text, re.ASCII) is not None
            assert fits(parsed, text) == want, (pattern, text)
            state = automaton.follow(automaton.start, text.encode())
            assert may_end(automaton.patterns[state]) == want, (pattern, text)
            seen[want] += 1
    assert min(seen.values()) > 200


def test_nullable_parts_and_counts_equal_pythons():
    for pattern in ("(a?){2,3}", "(a*b?){2}", "(a?b?){3,}", "((a|b)?){2,4}c", "(a{0,2}){2,3}", "((a*)*)*b", "(|a){2}"):
        parsed = parse_regex(pattern)
        for n in range(7):
            for k in range(2 ** n):
                text = f"{k:0{n}b}".replace("0", "a").replace("1", "b")[:n] if n else ""
                for said in (text, text + "c"):
                    assert fits(parsed, said) == (re.fullmatch(pattern, said) is not None), (pattern, said)


def test_nothing_is_only_what_nothing_matches():
    """No other pattern is without a match: that is what the search for allowed tokens relies on."""
    a = one_of(b"a")
    assert one_of([]) == choice() == choice(NOTHING, NOTHING) == sequence(a, NOTHING) == repeat(NOTHING, 1, 4) == NOTHING
    assert repeat(NOTHING, 0) == repeat(a, 0, 0) == repeat(b"", 3) == sequence() == b""
    assert choice(a, choice(b"b", a)) == choice(b"b", a) and repeat(a, 1, 1) == a
    assert sequence(b"a", sequence(b"b", a), b"", b"c") == ("seq", b"ab", a, b"c")


def test_every_code_point_is_one_character():
    """Around the borders of UTF-8's table, and bytes that are none."""
    one = Automaton(parse_regex("."))
    for code in (0, 0x7f, 0x80, 0x7ff, 0x800, 0xfff, 0x1000, 0xcfff, 0xd000, 0xd7ff, 0xe000, 0xffff, 0x10000, 0x3ffff,
                 0x40000, 0xfffff, 0x100000, 0x10ffff):
        assert may_end(one.patterns[one.follow(one.start, chr(code).encode())]) == (code != 10)
    for data in (b"\x80", b"\xc1\xbf", b"\xe0\x9f\xbf", b"\xed\xa0\x80", b"\xf4\x90\x80\x80", b"\xf5", b"\xff", b"\xc2"):
        assert not may_end(one.patterns[one.follow(one.start, data)]), data


@pytest.mark.parametrize("pattern", [r"[.-\/]", r"[!-\]]", r"[\[-\]]", r"[\t-\n]", r"[\\-a]", r"[+\-a]", r"[]-a]", r"[^!-\]]",
                                     r"[\d\-a]", "[--/]", "[a-]", r"[\^-`]", r"[\–a]",
                                     r"[~-\§]"])
def test_classes_equal_pythons(pattern):
    parsed = parse_regex(pattern)
    for c in [*map(chr, range(128)), "é", "–", "§"]:
        assert fits(parsed, c) == (re.fullmatch(pattern, c) is not None), (pattern, c)


@pytest.mark.parametrize("pattern", ["[\\", r"[a-\d]", r"[a-\\", r"[\b]", r"[\]", r"[a-\q]", "(", ")", "a)", "[", "[]", "[b-a]", "*", "+a",
                                     "^a", "a$", r"\b", r"\1", "a{2,1}", "a{2000}", "a{2000,}", "[^é]", "\\", "(?=a)", "{",
                                     "\ud800", "[\udc00]", "(" * 5000, "(" * 400 + "a" + ")" * 400 + "(" * 900])
def test_bad_patterns(pattern, tokenizer):
    with pytest.raises(ValueError) as error:
        RegexConstraint(pattern, tokenizer, [2])
    assert "\n" not in str(error.value)


# ------------------------------------------------------------------ tokens

def test_allowed_tokens_are_exactly_those_that_can_go_on(tokenizer):
    """By trying every token: can the text with it still be completed, judged by the choices themselves."""
    choices = ["the cat", "the cow", "a dog", "théâtre"]
    constraint = choice_constraint(choices, tokenizer, [2])
    for start in ("", "the", "the c", "a", "th"):
        new = tokenizer.encode_ordinary(start)
        shaped = constraint([[5, *new]], torch.zeros(1, tokenizer.vocab_size), len(new))[0]
        for i in range(3, tokenizer.vocab_size):
            said = start.encode() + tokenizer.decode_bytes([i])
            assert bool(shaped[i] == 0) == any(c.encode().startswith(said) for c in choices)
        assert (shaped[:3] == -torch.inf).all()
    new = tokenizer.encode_ordinary("a dog")
    shaped = constraint([new], torch.zeros(1, tokenizer.vocab_size), len(new))[0]
    assert (shaped == 0).nonzero().tolist() == [[2]]


def test_the_table_finds_what_derivatives_find(small):
    """Every token, from the states that random texts lead to."""
    tokenizer, rng = small[1], random.Random(1)
    trie = trie_of(tokenizer)
    for _ in range(40):
        pattern = parse_regex(random_pattern(rng))
        automaton = Automaton(pattern)
        state = automaton.follow(automaton.start, rng.choice(["", "a", "b1", "é"]).encode())
        after = trie.states_after(automaton, state)
        for i, token in enumerate(trie.tokens):
            left = automaton.patterns[state]
            for byte in token:
                left = derive(left, byte)
            assert automaton.patterns[after[i]] == (left if token else NOTHING)


def test_every_drawn_text_matches(model, tokenizer, prompts):
    for pattern in (r"(yes|no), \d{1,3} (times|days)\.", r"[A-Z][a-z]{2,8}( [a-z]{1,9}){2,4}\.", r"\{\"age\": \d{1,3}\}",
                    "(é|ü){2,3}"):
        constraint = RegexConstraint(pattern, tokenizer, [2])
        texts = generate(model, prompts, processors=[constraint], stop_ids=[2], max_new_tokens=40, seed=0, temperature=1.5)
        for text in texts:
            said = tokenizer.decode(text.ids)
            assert text.finish_reason == "stop" and re.fullmatch(pattern, said), (pattern, said)


def test_choices_with_every_strategy(model, tokenizer, prompts):
    constraint = choice_constraint(["Yes.", "No.", "Perhaps so."], tokenizer, [2])
    options = Options(max_new_tokens=12, stop_ids=[2], processors=[constraint], seed=3)
    guessed = speculate(model, NGramDraft(prompts), prompts[0], options)
    list(guessed)
    drawn = [generate(model, prompts[0], options), guessed.result, beam_search(model, prompts[0], options=options)[0]]
    for text in drawn:
        assert tokenizer.decode(text.ids) in ("Yes.", "No.", "Perhaps so.")
    best = -float("inf")  # of the usual way to write each choice in tokens, scored by the model alone
    for said in ("Yes.", "No.", "Perhaps so."):
        ids = tokenizer.encode_ordinary(said) + [2]
        with torch.no_grad():
            logp = model(torch.tensor([prompts[0] + ids]))[0, len(prompts[0]) - 1:-1].log_softmax(-1)
        best = max(best, float(logp.gather(-1, torch.tensor(ids)[:, None]).mean()))
    assert drawn[2].score >= best - 1e-4


def test_what_cannot_match_has_no_token_left(small):
    """An id that the constraint would not have allowed, a special token within the text, and diverged logits."""
    model, tokenizer, stop = small
    constraint = RegexConstraint("[ab]+", tokenizer, stop)
    for said in (tokenizer.encode_ordinary("x"), stop):
        assert (constraint([said], torch.zeros(1, 400), len(said)) == -torch.inf).all()
    assert "no token is left" in error_of(generate, model, [1], processors=[constraint, lambda ids, logits, step:
                                                                           logits.masked_fill(logits > -1e9, -torch.inf)])
    wider = constraint([[]], torch.zeros(1, 500), 0)                  # a table of logits with spare rows
    assert (wider[0, 400:] == -torch.inf).all() and (wider == 0).any()


@pytest.mark.parametrize("call, message", [
    (lambda t: RegexConstraint("a", t, []), "stop_ids must be at least one id"),
    (lambda t: RegexConstraint("[ab]{50}", t, [399], max_new_tokens=3), "max_new_tokens=3 must be"),
    (lambda t: choice_constraint([], t, [399]), "choices=[] must be a list"),
    (lambda t: choice_constraint("yes", t, [399]), "choices='yes' must be a list")])
def test_bad_constraints(call, message, small):
    assert error_of(call, small[1]).startswith(f"ValueError: {message}")


def test_a_text_ends_in_the_room_that_it_has(small):
    """At the least room, and with a little more: never cut off, and never out of the pattern."""
    model, tokenizer, stop = small
    rng, tight = random.Random(2), 0
    for n in range(150):
        pattern = random_pattern(rng)
        free = RegexConstraint(pattern, tokenizer, stop)
        room = free.costs.least() + rng.choice([0, 0, 1, 3])
        within = RegexConstraint(pattern, tokenizer, stop, max_new_tokens=room)
        text = generate(model, [1, 2], processors=[within], stop_ids=stop, max_new_tokens=room, seed=n)
        assert text.finish_reason == "stop" and re.fullmatch(pattern, tokenizer.decode(text.ids), re.ASCII), pattern
        tight += len(text.ids) + 1 == room
    assert tight > 50


def test_states_are_forgotten_when_they_are_many(small):
    constraint = RegexConstraint("(a|b)*a(a|b){9}", small[1], small[2])
    rng = random.Random(0)
    zeros, most = torch.zeros(1, 400), 0
    constraint.costs.max_states = 300
    for _ in range(60):
        said = small[1].encode_ordinary("".join(rng.choices("ab", k=30)))
        shaped = constraint([said], zeros, len(said))
        fresh = RegexConstraint("(a|b)*a(a|b){9}", small[1], small[2])([said], zeros, len(said))
        assert torch.equal(shaped, fresh)
        most = max(most, len(constraint.costs.automaton.patterns))
    assert 300 < most < 1500


# ------------------------------------------------------------------ JSON

def random_schema(rng, depth=0):
    """(a schema, a function that draws a valid value in the narrow way of writing that we allow)"""
    kind = rng.randrange(12 if depth < 3 else 8)
    if kind == 0:
        low = rng.choice([0, 0, 1, 3])
        high = low + rng.choice([0, 1, 6])
        schema = {"type": "string"} | rng.choice([{"minLength": low, "maxLength": high}, {"maxLength": high}])
        low = schema.get("minLength", 0)
        return schema, lambda: "".join(rng.choices("ab é日😀\"\\\n\t/{", k=rng.randint(low, high)))
    if kind == 1:
        schema, values = rng.choice([
            ({"pattern": "^[a-c]{2,4}$"}, ["ab", "ccca"]), ({"pattern": "^\"?x\\\\+$"}, ['"x\\', "x\\\\"]),
            ({"pattern": "ab"}, ["ab", "xxaby"]), ({"format": "date"}, ["2026-11-28"]),
            ({"format": "uuid"}, ["0" * 8 + "-0000" * 3 + "-" + "a" * 12]), ({"format": "date-time"}, ["1999-01-02T03:04:05Z"])])
        return {"type": "string"} | schema, lambda: rng.choice(values)
    if kind == 2:
        low, high = sorted((rng.randint(-300, 300), rng.randint(-300, 3000)))
        bounds = {"minimum": low, "maximum": high} if rng.random() < 0.5 else {
            "exclusiveMinimum": low - 1, "exclusiveMaximum": high + 1}
        return {"type": "integer"} | bounds, lambda: rng.randint(low, high)
    if kind == 3:
        return ({"type": "integer"}, lambda: rng.randint(-10 ** 9, 10 ** 9)) if rng.random() < 0.5 else (
            {"type": "number"}, lambda: rng.choice([0, -1.5, 27, 0.25, 1234.125]))
    if kind == 4:
        return rng.choice([({"type": "boolean"}, lambda: rng.random() < 0.5), ({"type": "null"}, lambda: None),
                           ({"type": ["boolean", "null"], "title": "t"}, lambda: rng.choice([True, None]))])
    if kind == 5:
        values = rng.sample([1, -2.5, "x", "é\n\"", None, True, [1, {"a": 2}], {}, {"k": [None]}, "y" * 30], 3)
        return rng.choice([({"enum": values}, lambda: rng.choice(values)), ({"const": values[0]}, lambda: values[0])])
    if kind == 6:
        return {"type": "string", "enum": ["one", 2, "three"]}, lambda: rng.choice(["one", "three"])
    if kind == 7:
        return rng.choice([{}, True, {"description": "anything"}]), lambda: rng.choice(
            [1, "x", None, [], [True, [2]], {"a": {"b": 1}}])
    if kind == 8:
        inner, draw = random_schema(rng, depth + 1)
        low = rng.choice([0, 0, 1, 2])
        high = low + rng.randrange(3)
        schema = {"type": "array", "items": inner, "minItems": low, "maxItems": high}
        return schema, lambda: [draw() for _ in range(rng.randint(low, high))]
    if kind == 9:
        options = [random_schema(rng, depth + 1) for _ in range(rng.randrange(1, 4))]
        return {"anyOf": [schema for schema, _ in options]}, lambda: rng.choice(options)[1]()
    names = rng.sample(["a", "b", "name", "é", "with \"quotes\"", "n/m~"], rng.randrange(5))
    parts = {name: random_schema(rng, depth + 1) for name in names}
    required = [name for name in names if rng.random() < 0.5]
    schema = {"type": "object", "properties": {name: part for name, (part, _) in parts.items()}, "required": required}
    if rng.random() < 0.5:
        schema["additionalProperties"] = False
    return schema, lambda: {name: draw() for name, (_, draw) in parts.items() if name in required or rng.random() < 0.5}


def check(schema, value):
    jsonschema.Draft202012Validator(schema, format_checker=jsonschema.FormatChecker()).validate(value)


def test_every_output_is_valid_json_over_1000_schemas(small, ledger):
    """Of a random model, and with little room: what is drawn parses and is valid, as jsonschema judges."""
    model, tokenizer, stop = small
    rng, lengths, kinds = random.Random(0), [], Counter()
    for n in range(1000):
        schema, _ = random_schema(rng)
        free = json_constraint(schema, tokenizer, stop)
        room = free.costs.least() + rng.choice([0, 2, 10, 40])
        within = json_constraint(schema, tokenizer, stop, max_new_tokens=room)
        text = generate(model, [n % 300], processors=[within], stop_ids=stop, max_new_tokens=room, seed=n)
        said = b"".join(tokenizer.decode_bytes([i]) for i in text.ids).decode()  # an error if it is no UTF-8
        value = json.loads(said)
        check(schema, value)
        assert text.finish_reason == "stop"
        lengths.append(len(text.ids))
        kinds[type(value).__name__] += 1
    ledger("texts under 1,000 random JSON schemas that do not parse or are not valid", 0, peer="jsonschema", bound=0)
    assert sum(lengths) > 5000 and len(kinds) >= 7 and min(kinds.values()) > 20, (sum(lengths), kinds)


def test_texts_end_by_themselves_without_a_limit(small):
    """The bounds that schemas leave out are there."""
    model, tokenizer, stop = small
    schema = {"type": "object", "properties": {"a": {"type": "string"}, "b": {"type": "array", "items": {"type": "number"}},
                                               "c": {}}, "required": ["a", "b", "c"]}
    constraint = json_constraint(schema, tokenizer, stop)
    for text in generate(model, [[1]] * 8, processors=[constraint], stop_ids=stop, max_new_tokens=1000, seed=0):
        check(schema, json.loads(tokenizer.decode(text.ids)))
        assert text.finish_reason == "stop"


def test_valid_values_are_not_refused():
    """As json.dumps writes them: the pattern is not narrower than is said."""
    rng = random.Random(1)
    for _ in range(400):
        schema, draw = random_schema(rng)
        automaton = Automaton(json_schema_pattern(schema))
        for _ in range(3):
            value = draw()
            check(schema, value)
            text = json.dumps(value, ensure_ascii=False)
            state = automaton.follow(automaton.start, text.encode())
            assert may_end(automaton.patterns[state]), (schema, text)


@pytest.mark.parametrize("low, high", [(0, 0), (0, 9), (7, 7), (3, 12), (95, 1204), (-7, 5), (-1203, -88), (-10, -1), (100, 999)])
def test_integers_between_bounds(low, high):
    pattern = json_schema_pattern({"type": "integer", "minimum": low, "maximum": high})
    for n in range(low - 130, high + 130):
        assert fits(pattern, str(n)) == (low <= n <= high)
    for text in ("01", "+1", "-0", "", "-", "1.0"):
        assert not fits(pattern, text)


def test_references_within_the_schema():
    schema = {"$defs": {"kind": {"enum": ["cat", "dog"]}, "a/b~c": {"type": "null"}}, "type": "array", "maxItems": 2,
              "items": {"anyOf": [{"$ref": "#/$defs/kind"}, {"$ref": "#/$defs/a~1b~0c"}]}}
    pattern = json_schema_pattern(schema)
    assert [fits(pattern, text) for text in ('["cat", null]', '["cow"]', "[]")] == [True, False, True]


def test_free_objects_take_any_names():
    pattern = json_schema_pattern({"type": "object", "additionalProperties": {"type": "integer"}})
    assert [fits(pattern, text) for text in ('{"x": 1, "y z": -2}', "{}", '{"x": "1"}')] == [True, True, False]
    anything = json_schema_pattern({"type": "object"})
    assert fits(anything, '{"a": [1, {}, "x"], "b": null}') and not fits(anything, "[]")
    assert fits(json_schema_pattern({"type": "object", "additionalProperties": False}), "{}")


DEEP = {}
for _ in range(14):
    DEEP = {"type": "array", "items": DEEP}


@pytest.mark.parametrize("schema, message", [
    ({"type": "object", "properties": {"x": {"allOf": [{}]}}}, "#/properties/x: 'allOf' is not supported"),
    ({"type": "array", "items": {"oneOf": [{}]}}, "#/items: 'oneOf' is not supported"),
    ({"type": "array", "uniqueItems": True}, "#: 'uniqueItems' is not supported"),
    ({"type": "integer", "multipleOf": 3}, "#: 'multipleOf' is not supported"),
    ({"type": "object", "patternProperties": {}}, "#: 'patternProperties' is not supported"),
    ({"type": "string", "minimum": 1}, "#: 'minimum' is not supported"),
    ({"type": "number", "minimum": 1}, "#: minimum is supported for integers only"),
    ({"type": "integer", "minimum": 0.5}, "#: minimum=0.5 must be a whole number"),
    ({"type": "integer", "minimum": 3, "maximum": 2}, "#: no value is valid"),
    ({"anyOf": [{"type": "object", "required": ["x"]}]}, "#/anyOf/0: the required 'x' is not among"),
    ({"anyOf": [{}], "type": "string"}, "#: 'type' is not supported"), ({"anyOf": []}, "#: anyOf must be a list"),
    ({"$ref": "#"}, "#: nested too deeply"), ({"$ref": "other.json"}, "#: $ref 'other.json' names no part"),
    ({"$ref": "#/$defs/x"}, "#: $ref '#/$defs/x' names no part"), (DEEP, "nested too deeply"),
    ({"type": "text"}, "#: type='text' must be"), ({"type": []}, "#: type=[] must be"), ({"minLength": 2}, "#: type=None must be"),
    ({"type": "string", "minLength": 3, "maxLength": 2}, "#: minLength=3 is above maxLength=2"),
    ({"type": "string", "minLength": -1}, "#: minLength=-1 must be"), ({"type": "array", "maxItems": True}, "#: maxItems=True"),
    ({"type": "string", "pattern": "(?=a)"}, "#: regex '(?=a)'"), ({"type": "string", "pattern": 3}, "#: pattern is no text"),
    ({"type": "string", "pattern": "a", "maxLength": 3}, "#: maxLength and pattern together"),
    ({"type": "string", "format": "email"}, "#: format 'email' is not supported"),
    ({"const": float("nan")}, "#: nan can't be written"), ({"enum": ["\ud800"]}, "#: '\\ud800' can't be written"),
    ({"enum": []}, "#: no value is valid"), (False, "#: no value is valid"), ([1], "#: [1] is no schema"), ("x", "#: 'x' is no schema"),
    ({"type": "array", "items": False, "minItems": 1}, "#: no value is valid"),
    ({"$defs": {f"d{i}": {"type": "object", "properties": {n: {"$ref": f"#/$defs/d{i + 1}"} for n in "abcdefgh"}} for i in range(4)}
      | {"d4": {"type": "null"}}, "$ref": "#/$defs/d0"}, "more than 2000 parts")])
def test_what_is_not_supported_is_named_with_its_place(schema, message):
    said = error_of(json_schema_pattern, schema)
    assert said.startswith("ValueError: schema, #") and message in said and "\n" not in said


# ------------------------------------------------------------------ the exercises

@pytest.fixture(scope="module")
def names():
    """What the checks of the notebook look at: the module, and the small functions of four cells."""
    cells = json.loads((NBS / "deeper" / "constrained.ipynb").read_text(encoding="utf-8"))["cells"]
    code = {cell["id"]: "".join(cell["source"]) for cell in cells}
    space = dict(vars(constrained), json=json, parse_regex=parse_regex)
    for name in ("fits", "json", "json-1", "json-2"):
        exec(code[name], space)
    return space


@pytest.mark.parametrize("number, empty, check, solution", exercises("deeper/constrained"), ids=lambda v: v if len(v) == 13 else "")
def test_exercise(number, empty, check, solution, names, capsys):
    assert said(empty, check, names, capsys) == "not solved yet"
    assert said(solution, check, names, capsys) == "correct"


@pytest.mark.parametrize("number, wrong, message", [
    (1, r"times = r'\d\d:\d\d'", "00:60 is too much"), (1, r"times = r'[01]\d:[0-5]\d'", "20:00 is missing"),
    (2, "def derive_and(p, byte):\n    return 'and', derive(p[1], byte), p[2]\ndef may_end_and(p):\n    return may_end(p[1])",
     "'abd' is too much"), (3, "value_3 = lambda schema: value({'type': 'array', 'items': {'type': 'integer'}})", "[null, 7, true] is missing")])
def test_checks_of_exercises_find_mistakes(number, wrong, message, names, capsys):
    check = exercises("deeper/constrained")[number - 1][2]
    assert said(wrong, check, names, capsys).startswith(message)
