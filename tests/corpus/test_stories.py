"""The embedded corpus: its streams, its exact information, and the claim that no story has two derivations."""

import math
import random
import re
import statistics
from itertools import combinations, islice

import pytest

from basic.corpus.stories.grammar import (
    Grammar,
    Mention,
    Switch,
    entropy_nats,
    num_stories,
    stories,
    story_grammar,
    story_nats,
)
from basic.corpus.stories.words import BOYS, GIRLS, RULES, WORDS

# Small enough to be counted by hand: 3/4 * (2 cats or 1 dog) + 1/4, as a remembered word decides what it says.
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


def test_a_small_grammar_draws_parses_and_counts_as_by_hand():
    uniform = random.Random(0).random
    drawn = dict(TOY.draw(uniform) for _ in range(500))
    assert drawn.keys() == TOY_STORIES.keys()
    for text, probability in TOY_STORIES.items():
        assert drawn[text] == pytest.approx(-math.log(probability), abs=1e-12)
        assert TOY.parse(text) == ([pytest.approx(drawn[text], abs=1e-12)], len(text))
    assert TOY.parse("A tom came. It purred. Good tabby!")[0] == []
    entropy = -sum(p * math.log(p) for p in TOY_STORIES.values())
    assert TOY.count() == (6, pytest.approx(entropy, abs=1e-12))


def test_a_seed_fixes_the_stories():
    assert list(stories(7, 50)) == list(stories(7, 50))
    assert list(stories(7, 50)) != list(stories(8, 50))


@pytest.mark.parametrize("count", [0, 1, 10])
def test_fewer_stories_are_the_beginning_of_more(count):
    assert list(stories(3, count)) == list(stories(3, 20))[:count] == list(islice(stories(3), count))


def test_every_story_has_one_derivation_with_the_information_it_was_drawn_with():
    for story in stories(1, 1000):
        derivations, followed = story_grammar().parse(story.text)
        assert len(derivations) == 1, story.text
        assert derivations[0] == pytest.approx(story.nats, abs=1e-9)
        assert followed == len(story.text)
    assert story_nats(story.text) == derivations[0]


def test_there_are_more_stories_than_anyone_can_read():
    assert num_stories() >= 10**12


def test_the_exact_entropy_is_the_mean_information_of_a_sample():
    nats = [story.nats for story in stories(2, 20_000)]
    standard_error = statistics.stdev(nats) / math.sqrt(len(nats))
    assert abs(statistics.mean(nats) - entropy_nats()) < 4 * standard_error


# --- Unambiguity, proven rather than sampled


def heads(chain, bound, known):
    """All ways to go on: (text, rest, words remembered). What was remembered before the rivals parted, `known`, may
    be any word: that allows more than the grammar does, so that two rivals that never meet here never meet there."""
    if chain is None:
        yield "", None, bound
        return
    part, rest = chain
    variable = getattr(part, "variable", None)
    choices = [part]
    if isinstance(part, str):
        yield from [(part, rest, bound)] if part else heads(rest, bound, known)
        return
    if isinstance(part, Mention):
        if variable in bound:
            yield bound[variable][part.form], rest, bound
            return
        source = part.source
        choices = [source] if not isinstance(source, Switch) else cases(source, bound)
        words = [word for choice in choices for word in choice.options]
        if variable in known:
            yield from ((text, rest, bound) for text in {word[part.form] for word in words})
        else:
            yield from ((word[part.form], rest, {**bound, variable: word}) for word in words)
        return
    for choice in cases(part, bound) if isinstance(part, Switch) else choices:
        for option in choice.options:
            yield from heads(chained(option, rest), bound, known)


def cases(switch, bound):
    if switch.variable in bound:
        return [switch.cases[bound[switch.variable][switch.form]]]
    return list(switch.cases.values())


def chained(parts, rest):
    for part in reversed(parts):
        rest = (part, rest)
    return rest


def can_meet(lefts, rights, known):
    """Whether one of the left ways to go on, each (text, rest, words remembered), can write what a right one can."""
    pairs = [(left, right) for left in lefts for right in rights if left[0][:1] == right[0][:1]]
    while pairs:
        left, right = pairs.pop()
        length = min(len(left[0]), len(right[0]))
        if left[0][:length] != right[0][:length]:
            continue
        left, right = ((text[length:], *others) for text, *others in (left, right))
        if left[0] == right[0] == "" and left[1] is right[1] is None:
            return True
        lefts, rights = ([way] if way[0] else list(heads(*way[1:], known)) for way in (left, right))
        pairs += [(a, b) for a in lefts for b in rights if a[0][:1] == b[0][:1]]
    return False


def rivals(grammar):
    """Every place where a derivation has a choice: for each option all (text, rest, words) that it begins with, and
    the words known before."""
    waiting: list = [((grammar.start, None), frozenset())]
    seen = set()
    links = {}  # equal chains are one object, so that a place reached in many ways is looked at once
    while waiting:
        chain, known = waiting.pop()
        if chain is None or (id(chain), known) in seen:
            continue
        seen.add((id(chain), known))
        part, rest = chain
        if isinstance(part, str) or (isinstance(part, Mention) and part.variable in known):
            waiting.append((rest, known))
            continue
        source = part.source if isinstance(part, Mention) else part
        for choice in source.cases.values() if isinstance(source, Switch) else [source]:
            if isinstance(part, Mention):
                yield [[(word[part.form], rest, {part.variable: word})] for word in choice.options], known
                waiting.append((rest, known | {part.variable}))
            else:
                after = [links.setdefault((id(option), id(rest)), chained(option, rest)) for option in choice.options]
                yield [list(heads(way, {}, known)) for way in after], known
                waiting += [(way, known) for way in after]


def first_ambiguity(grammar):
    for options, known in rivals(grammar):
        for left, right in combinations(options, 2):
            if can_meet(left, right, known):
                return left, right
    return None


def test_no_two_derivations_can_write_the_same_story():
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


# --- Stories that can be read aloud


def test_pronouns_agree_with_the_hero():
    girls, boys = ({word[""] for word in names} for names in (GIRLS, BOYS))
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


@pytest.mark.parametrize(("text", "followed"), [("", 0), ("Once upon a crime", 12), ("There once was a cat", 15)])
def test_a_text_that_is_no_story_is_refused_where_it_stops_being_one(text, followed):
    with pytest.raises(ValueError, match=f"{followed} of its {len(text)} characters"):
        story_nats(text)


def test_a_story_that_goes_on_is_refused_at_its_end():
    text = next(stories(5)).text
    with pytest.raises(ValueError, match=f"{len(text)} of its {len(text) + 1} characters"):
        story_nats(text + "!")


@pytest.mark.parametrize(("arguments", "error"), [((-1,), ValueError), ((1, -1), ValueError), ((1.5,), TypeError)])
def test_bad_arguments_are_refused_at_once(arguments, error):
    with pytest.raises(error):
        stories(*arguments)
