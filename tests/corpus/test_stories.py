"""The embedded corpus: its streams, its exact information, and the proof that no story has two derivations."""

import math
import random
import re
import statistics
from itertools import combinations, islice

import pytest

from basic.common.errors import InvalidInputError
from basic.corpus.stories.grammar import ConditionalRule, Grammar, VariableReference, stories, story_grammar, story_nats
from basic.corpus.stories.words import RULES, WORDS

# Small enough to be counted by hand: 3/4 * (2 cats or 1 dog) + 1/4, where the variable's word selects a rule.
TOY = Grammar(
    {
        "story": ["3*{pet.A} came. <said {pet.kind}> Good {pet}!", "The end."],
        "said cat": ["It [purred|mewed]."],
        "said dog": ["It barked."],
    },
    {
        "pet": [
            {"": "tabby", "a": "a tabby", "kind": "cat"},
            {"": "tom", "a": "a tom", "kind": "cat"},
            {"": "hound", "a": "a hound", "kind": "dog", "weight": "2"},
        ]
    },
    {},
)
TOY_STORIES = {
    "A tabby came. It purred. Good tabby!": 3 / 32,
    "A tabby came. It mewed. Good tabby!": 3 / 32,
    "A tom came. It purred. Good tom!": 3 / 32,
    "A tom came. It mewed. Good tom!": 3 / 32,
    "A hound came. It barked. Good hound!": 3 / 8,
    "The end.": 1 / 4,
}


def test_a_small_grammar_agrees_with_counting_by_hand():
    uniform = random.Random(0).random
    sampled = dict(TOY.sample(uniform) for _ in range(500))
    assert sampled.keys() == TOY_STORIES.keys()
    for text, probability in TOY_STORIES.items():
        assert sampled[text] == pytest.approx(-math.log(probability), abs=1e-12)
        assert TOY.parse(text) == ([pytest.approx(sampled[text], abs=1e-12)], len(text))
    assert TOY.parse("A tom came. It purred. Good tabby!")[0] == []
    entropy = -sum(p * math.log(p) for p in TOY_STORIES.values())
    assert TOY.count() == (6, pytest.approx(entropy, abs=1e-12))


def test_a_seed_fixes_the_stories():
    assert list(stories(7, 50)) == list(stories(7, 50))
    assert list(stories(7, 50)) != list(stories(8, 50))


@pytest.mark.parametrize("count", [0, 1, 10])
def test_a_smaller_count_gives_the_first_stories(count):
    assert list(stories(3, count)) == list(stories(3, 20))[:count] == list(islice(stories(3), count))


def test_every_story_has_one_derivation_with_the_information_it_was_sampled_with():
    for story in stories(1, 1000):
        derivations, prefix_length = story_grammar().parse(story.text)
        assert len(derivations) == 1, story.text
        assert derivations[0] == pytest.approx(story.nats, abs=1e-9)
        assert prefix_length == len(story.text)
    assert story_nats(story.text) == derivations[0]


def test_there_are_more_stories_than_anyone_can_read():
    assert story_grammar().count()[0] >= 10**12


def test_the_exact_entropy_is_the_mean_information_of_a_sample():
    nats = [story.nats for story in stories(2, 20_000)]
    standard_error = statistics.stdev(nats) / math.sqrt(len(nats))
    assert abs(statistics.mean(nats) - story_grammar().count()[1]) < 4 * standard_error


# --- A proof that the grammar is unambiguous


def first_texts(stack, bindings, known):
    """All ways to continue a derivation: (first text, rest of the stack, bindings).

    A variable in `known` was bound before the two derivations differ, and may have any word. That allows more than the
    grammar does, so derivations that never meet here never meet in the grammar.
    """
    if stack is None:
        yield "", None, bindings
        return
    symbol, rest = stack
    variable = getattr(symbol, "variable", None)
    rules = [symbol]
    if isinstance(symbol, str):
        yield from [(symbol, rest, bindings)] if symbol else first_texts(rest, bindings, known)
        return
    if isinstance(symbol, VariableReference):
        if variable in bindings:
            yield bindings[variable][symbol.form], rest, bindings
            return
        source = symbol.source
        rules = [source] if not isinstance(source, ConditionalRule) else cases(source, bindings)
        words = [word for rule in rules for word in rule.alternatives]
        if variable in known:
            yield from ((text, rest, bindings) for text in {word[symbol.form] for word in words})
        else:
            yield from ((word[symbol.form], rest, {**bindings, variable: word}) for word in words)
        return
    for rule in cases(symbol, bindings) if isinstance(symbol, ConditionalRule) else rules:
        for alternative in rule.alternatives:
            yield from first_texts(pushed(alternative, rest), bindings, known)


def cases(rule, bindings):
    if rule.variable in bindings:
        return [rule.cases[bindings[rule.variable][rule.form]]]
    return list(rule.cases.values())


def pushed(symbols, stack):
    for symbol in reversed(symbols):
        stack = (symbol, stack)
    return stack


def can_meet(lefts, rights, known):
    """Whether a left derivation, (first text, rest of the stack, bindings), can produce the text of a right one."""
    pairs = [(left, right) for left in lefts for right in rights if left[0][:1] == right[0][:1]]
    while pairs:
        left, right = pairs.pop()
        length = min(len(left[0]), len(right[0]))
        if left[0][:length] != right[0][:length]:
            continue
        left, right = ((text[length:], *others) for text, *others in (left, right))
        if left[0] == right[0] == "" and left[1] is right[1] is None:
            return True
        lefts, rights = ([way] if way[0] else list(first_texts(*way[1:], known)) for way in (left, right))
        pairs += [(a, b) for a in lefts for b in rights if a[0][:1] == b[0][:1]]
    return False


def choices(grammar):
    """Every choice in a derivation: for each alternative all (first text, rest of the stack, bindings), and the
    variables that are bound before."""
    waiting: list = [((grammar.start, None), frozenset())]
    seen = set()
    stacks = {}  # equal stacks are one object, so that a choice that is reached in several ways is visited once
    while waiting:
        stack, known = waiting.pop()
        if stack is None or (id(stack), known) in seen:
            continue
        seen.add((id(stack), known))
        symbol, rest = stack
        if isinstance(symbol, str) or (isinstance(symbol, VariableReference) and symbol.variable in known):
            waiting.append((rest, known))
            continue
        source = symbol.source if isinstance(symbol, VariableReference) else symbol
        for rule in source.cases.values() if isinstance(source, ConditionalRule) else [source]:
            if isinstance(symbol, VariableReference):
                yield [[(word[symbol.form], rest, {symbol.variable: word})] for word in rule.alternatives], known
                waiting.append((rest, known | {symbol.variable}))
            else:
                after = [
                    stacks.setdefault((id(alternative), id(rest)), pushed(alternative, rest))
                    for alternative in rule.alternatives
                ]
                yield [list(first_texts(way, {}, known)) for way in after], known
                waiting += [(way, known) for way in after]


def first_ambiguity(grammar):
    for alternatives, known in choices(grammar):
        for left, right in combinations(alternatives, 2):
            if can_meet(left, right, known):
                return left, right
    return None


def test_no_story_has_two_derivations():
    assert first_ambiguity(TOY) is None
    assert first_ambiguity(story_grammar()) is None


@pytest.mark.parametrize(
    "rules",
    [
        {"story": ["A [big|] cat.", "A big cat."]},
        {"story": ["<pet>s.", "cats."], "pet": ["cat", "dog"]},
        {"story": ["[a|ab][bc|c]"]},
    ],
)
def test_the_proof_finds_an_ambiguity(rules):
    grammar = Grammar(rules, {}, {})
    assert first_ambiguity(grammar) is not None


# --- Correct English


def test_pronouns_agree_with_the_hero():
    girls, boys = ({word[""] for word in names} for names in (WORDS["girl"], WORDS["boy"]))
    pronouns = {"she": girls, "her": girls, "he": boys, "him": boys, "his": boys}
    used = set()
    for story in stories(4, 2000):
        hero = story.text.split(" named ")[1].split()[0].rstrip(".?")
        words = set(re.findall(r"\w+", story.text.lower())) & pronouns.keys()
        assert all(hero in pronouns[word] for word in words), story.text
        used |= words
    assert used == pronouns.keys()


def test_spelling_and_spacing():
    for story in stories(5, 2000):
        assert not re.search(r"\ba [aeiou]|\ban [^aeiou]", story.text), story.text
        assert not re.search(r"  | [.,!?]|[.!?] [a-z]|[{}<>\[\]|*]", re.sub(r'[.!?]" [a-z]', "", story.text)), (
            story.text
        )
        assert re.fullmatch(r"[A-Z].*[.!?\"]", story.text), story.text
        assert story.text.count('"') % 2 == 0, story.text


NOUNS = ["who", "thing", "place", "helper", "creature", "tool", "food", "fear", "building", "noise", "room"]
VERBS = """moved, said, cried, wept, arrived, thanked, cheered, had fun, searched, slept, freed, begged, nuzzled, baked,
    shook, broke, swept floors, dusted shelves, trapped, nodded, adored it, vanished toy, vanished clothes, used toy"""


def test_there_are_hundreds_of_nouns_and_verbs():
    nouns = {word[""] for name in NOUNS for word in WORDS[name]}
    verbs = {alternative.split()[0] for name in VERBS.split(",") for alternative in RULES[" ".join(name.split())]}
    verbs |= {word[""].split()[0] for name in ("hobby", "skill") for word in WORDS[name]}
    assert len(nouns) >= 200
    assert len(verbs) >= 200


def test_every_story_is_short():
    assert max(len(re.findall(r"'s|\w+|[^\w\s]+", story.text)) for story in stories(6, 5000)) <= 105


# --- Bad input


@pytest.mark.parametrize(("text", "prefix_length"), [("", 0), ("Once upon a crime", 12), ("There once was a cat", 15)])
def test_a_text_that_is_not_a_story_is_refused(text, prefix_length):
    with pytest.raises(InvalidInputError, match=f"begin with {prefix_length} of the {len(text)} characters"):
        story_nats(text)


def test_a_text_after_a_story_is_refused():
    text = next(stories(5)).text
    with pytest.raises(InvalidInputError, match=f"begin with {len(text)} of the {len(text) + 1} characters"):
        story_nats(text + "!")


@pytest.mark.parametrize(
    ("arguments", "error"), [((-1,), InvalidInputError), ((1, -1), InvalidInputError), ((1.5,), TypeError)]
)
def test_bad_arguments_are_refused_at_once(arguments, error):
    with pytest.raises(error):
        stories(*arguments)
