"""The embedded corpus: little stories drawn from a grammar, any number of them, with their exact information.

`story_words.py` holds the words and sentences; here are the three things one can do with them:

    stories      draws: every choice has a known probability, and a story carries the sum of -log p of its choices;
    story_nats   parses: finds every derivation of a text, and from it the same number again;
    source_statistics  counts: how many stories there are, and their mean information, exactly.

Since no story has two derivations, the information of a story is exactly -log of its probability, and the mean over
all stories, the entropy of the source, is a floor that no model's loss can get under.
"""

from __future__ import annotations

import math
import random
import re
from bisect import bisect
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from itertools import accumulate, islice
from operator import index
from typing import Any, NamedTuple

from basic.story_words import DRAWN_FROM, RULES, WORDS, Word


class Story(NamedTuple):
    """A story and its information content, -log of its probability, in nats."""

    text: str
    nats: float


class Statistics(NamedTuple):
    """What is true of the whole source: the number of distinct stories and their mean information in nats."""

    num_stories: int
    entropy_nats: float


def stories(seed: int, count: int | None = None) -> Iterator[Story]:
    """Draw stories one by one; the same seed gives the same stories, and fewer are the beginning of more.

    Args:
        seed: not negative (Python's generator takes -1 and 1 for the same seed).
        count: how many stories; None for an endless stream.

    Returns:
        A lazy iterator of `Story`.

    Raises:
        TypeError: seed or count is not an integer.
        ValueError: seed or count is negative.
    """
    for name, value in {"seed": seed, "count": 0 if count is None else count}.items():
        if index(value) < 0:
            raise ValueError(f"{name}={value} must not be negative")
    return islice(_draw_forever(index(seed)), count)


def story_nats(text: str) -> float:
    """The information content of a story, found by parsing it: -log of the probability of drawing this text.

    Raises:
        ValueError: the text is not a story of the grammar; the message says how far it could be followed.
    """
    derivations, furthest = parse(text)
    if not derivations:
        raise ValueError(
            f"not a story of this grammar: nothing in it goes on from character {furthest}, "
            f"{text[:furthest][-20:]!r}, with {text[furthest:][:20]!r}"
        )
    assert len(derivations) == 1, f"the grammar is ambiguous: {len(derivations)} derivations of {text!r}"
    return derivations[0]


# --- The grammar, compiled -----------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False, slots=True)
class Choice:
    """A weighted choice among options: words, or sequences of parts.

    Option i is drawn when a uniform number of [0, 1) lies between cuts[i - 1] and cuts[i].
    """

    options: tuple
    probabilities: tuple[float, ...]
    cuts: tuple[float, ...]
    nats: tuple[float, ...]


@dataclass(frozen=True, eq=False, slots=True)
class Switch:
    """A choice that a form of a remembered word has made already: it says which choice to take."""

    variable: str
    form: str
    cases: dict[str, Choice]


@dataclass(frozen=True, eq=False, slots=True)
class Mention:
    """A form of a remembered word, which is drawn from the source if it has no value yet."""

    variable: str
    form: str
    source: Choice | Switch


Part = str | Mention | Choice | Switch
Parts = tuple[Part, ...]
Bound = dict[str, Word]

_TOKEN = re.compile(r"{(?P<variable>\w+)\.?(?P<form>\w*)}|<(?P<rule>[^>]+)>|(?P<bracket>[\[|\]])|(?P<text>[^{<\[|\]]+)")


def _choice(options: list, weights: list[int]) -> Choice:
    probabilities = [weight / sum(weights) for weight in weights]
    cuts = [total / sum(weights) for total in accumulate(weights)][:-1]
    nats = [-math.log(probability) for probability in probabilities]
    return Choice(tuple(options), tuple(probabilities), tuple(cuts), tuple(nats))


def _alternatives(tokens: Iterator[re.Match]) -> Choice:
    """The alternatives up to the closing bracket (or the end), each with its parts and its weight."""
    alternatives: list[list[Part]] = [[]]
    for token in tokens:
        if token["variable"]:
            alternatives[-1].append(Mention(token["variable"], token["form"], _source(token["variable"])))
        elif token["rule"]:
            alternatives[-1].append(_rule(token["rule"]))
        elif token["text"]:
            alternatives[-1].append(token["text"])
        elif token["bracket"] == "[":
            alternatives[-1].append(_alternatives(tokens))
        elif token["bracket"] == "|":
            alternatives.append([])
        else:
            break
    weights = [_take_weight(parts) for parts in alternatives]
    return _choice([tuple(parts) for parts in alternatives], weights)


def _take_weight(parts: list[Part]) -> int:
    """Remove a leading `3*` from an alternative, and return the 3."""
    first = parts[0] if parts else None
    weight = re.match(r"(\d+)\*", first) if isinstance(first, str) else None
    if not weight:
        return 1
    parts[0] = weight.string[weight.end() :]
    return int(weight[1])


@cache
def _rule(name: str) -> Choice | Switch:
    if "{" in name:
        return _switch(name, _rule)
    return _alternatives(_TOKEN.finditer("|".join(RULES[name])))


@cache
def _source(variable: str) -> Choice | Switch:
    name = DRAWN_FROM.get(variable, variable)
    return _switch(name, _word_list) if "{" in name else _word_list(name)


@cache
def _word_list(name: str) -> Choice:
    """A list of words, each with the capitalised twins of its forms."""
    words = [
        word | {form.capitalize(): text[:1].upper() + text[1:] for form, text in word.items() if form}
        for word in WORDS[name]
    ]
    return _choice(words, [int(word.get("weight", 1)) for word in words])


def _switch(name: str, case: Callable[[str], Any]) -> Switch:
    """A name like `spot {place.kind}`, with one case for every value that the form can have."""
    slot = _TOKEN.search(name, name.index("{"))
    assert slot is not None
    values = {word[slot["form"]] for word in _possible_words(slot["variable"])}
    cases = {value: case(name[: slot.start()] + value + name[slot.end() :]) for value in sorted(values)}
    return Switch(slot["variable"], slot["form"], cases)


def _possible_words(variable: str) -> list[Word]:
    source = _source(variable)
    lists = [source] if isinstance(source, Choice) else source.cases.values()
    return [word for choice in lists for word in choice.options]


_STORY: Parts = (_rule("story"),)


# --- Drawing -------------------------------------------------------------------------------------------------


def _draw_forever(seed: int) -> Iterator[Story]:
    uniform = random.Random(seed).random  # unlike choice() and sample(), the same in every version of Python
    while True:
        text: list[str] = []
        nats = _tell(_STORY, {}, text, uniform)
        yield Story("".join(text), nats)


def _tell(parts: Parts, bound: Bound, text: list[str], uniform: Callable[[], float]) -> float:
    """Write the parts to `text`, remembering words in `bound`; returns the information of the choices made."""
    nats = 0.0
    for part in parts:
        if isinstance(part, str):
            text.append(part)
            continue
        if isinstance(part, Mention):
            if part.variable not in bound:
                choice = _resolve(part.source, bound)
                drawn = bisect(choice.cuts, uniform())
                nats += choice.nats[drawn]
                bound[part.variable] = choice.options[drawn]
            text.append(bound[part.variable][part.form])
            continue
        choice = _resolve(part, bound)
        drawn = bisect(choice.cuts, uniform())
        nats += choice.nats[drawn] + _tell(choice.options[drawn], bound, text, uniform)
    return nats


# --- Parsing -------------------------------------------------------------------------------------------------


def parse(text: str) -> tuple[list[float], int]:
    """Every derivation of a text.

    Returns:
        The information of each derivation in nats (none if the text is not a story), and how many characters of
        the text the best attempt could follow.
    """
    derivations = []
    furthest = 0
    waiting = [(0, _chain(_STORY, None), {}, 0.0)]
    while waiting:
        position, chain, bound, nats = waiting.pop()
        furthest = max(furthest, position)
        if chain is None:
            if position == len(text):
                derivations.append(nats)
            continue
        part, rest = chain
        if isinstance(part, str):
            if text.startswith(part, position):
                waiting.append((position + len(part), rest, bound, nats))
            else:
                furthest = max(furthest, position + _common_prefix(part, text[position:]))
        elif isinstance(part, Mention) and part.variable in bound:
            waiting.append((position, (bound[part.variable][part.form], rest), bound, nats))
        elif isinstance(part, Mention):
            choice = _resolve(part.source, bound)
            for word, cost in zip(choice.options, choice.nats, strict=True):
                if text.startswith(word[part.form], position):
                    now = position + len(word[part.form])
                    waiting.append((now, rest, bound | {part.variable: word}, nats + cost))
        else:
            choice = _resolve(part, bound)
            for parts, cost in zip(choice.options, choice.nats, strict=True):
                waiting.append((position, _chain(parts, rest), bound, nats + cost))
    return derivations, furthest


def _resolve(choice: Choice | Switch, bound: Bound) -> Choice:
    return choice.cases[bound[choice.variable][choice.form]] if isinstance(choice, Switch) else choice


def _chain(parts: Parts, rest: tuple | None) -> tuple | None:
    """The parts as a linked list before the rest, so that branches of the search share what is still to come."""
    for part in reversed(parts):
        rest = (part, rest)
    return rest


def _common_prefix(left: str, right: str) -> int:
    return next((i for i, (a, b) in enumerate(zip(left, right, strict=False)) if a != b), min(len(left), len(right)))


# --- Counting ------------------------------------------------------------------------------------------------

# What a story may depend on later: for each remembered word, its forms that switches look at.
Known = frozenset[tuple[str, frozenset[tuple[str, str]]]]


class _Mass(NamedTuple):
    """All derivations that lead to one state: their total probability, number, and expected information."""

    probability: float
    count: int
    nats: float


@cache
def source_statistics() -> Statistics:
    """The number of distinct stories and the entropy of the source, exactly: no sampling.

    The grammar is followed once, with all stories at the same time: those that remember words of the same kinds
    go on alike, so that only their total probability, their number and their information are kept.
    """
    masses = _follow(_STORY, {frozenset(): _Mass(1.0, 1, 0.0)}).values()
    return Statistics(sum(mass.count for mass in masses), sum(mass.nats for mass in masses))


def _follow(parts: Parts, states: dict[Known, _Mass]) -> dict[Known, _Mass]:
    """Where the derivations of each state are after the parts."""
    for part in parts:
        if isinstance(part, str):
            continue
        after: dict[Known, _Mass] = defaultdict(lambda: _Mass(0.0, 0, 0.0))
        for known, mass in states.items():
            for state, more in _step(part, known, mass):
                old = after[state]
                after[state] = _Mass(old.probability + more.probability, old.count + more.count, old.nats + more.nats)
        states = after
    return states


def _step(part: Mention | Choice | Switch, known: Known, mass: _Mass) -> Iterator[tuple[Known, _Mass]]:
    bound = {variable: dict(forms) for variable, forms in known}
    if isinstance(part, Mention) and part.variable in bound:
        yield known, mass
        return
    choice = _resolve(part.source if isinstance(part, Mention) else part, bound)
    for option, probability, nats in zip(choice.options, choice.probabilities, choice.nats, strict=True):
        reached = mass.probability * probability
        chosen = _Mass(reached, mass.count, mass.nats * probability + reached * nats)
        if isinstance(part, Mention):
            forms = frozenset((form, option[form]) for form in _decisive_forms()[part.variable])
            yield known | {(part.variable, forms)}, chosen
        else:
            yield from _follow(option, {known: chosen}).items()


@cache
def _decisive_forms() -> dict[str, set[str]]:
    """For each variable, the forms of it that some switch looks at."""
    forms: dict[str, set[str]] = defaultdict(set)
    switches = re.findall(r"<[^>]*{(\w+)\.(\w+)}", str(RULES)) + re.findall(r"{(\w+)\.(\w+)}", str(DRAWN_FROM))
    for variable, form in switches:
        forms[variable].add(form)
    return forms


def num_stories() -> int:
    """The number of distinct stories, exactly."""
    return source_statistics().num_stories


def entropy_nats() -> float:
    """The mean information of a story in nats, exactly: the floor of any model's mean loss per story."""
    return source_statistics().entropy_nats
