"""The embedded corpus: little stories drawn from a grammar, any number of them, each with its exact information.

`story_words.py` holds the sentences and words; here is what can be done with them. One compiled grammar is read in
three ways:

    drawing    every choice has a known probability; a story's information is the sum of -log p over its choices;
    parsing    finds every derivation of a given text, and so recovers the same number from the text alone;
    counting   how many stories there are, and their mean information, exactly and without drawing any.

No story has two derivations. Therefore its information is exactly -log of its probability, and the mean over all
stories, the entropy of the source, is a floor that no model's mean loss can get under.
"""

from __future__ import annotations

import math
import random
import re
from bisect import bisect
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import accumulate, islice
from operator import index
from typing import Any, NamedTuple

from basic.corpus.stories.words import DRAWN_FROM, RULES, WORDS, Word


class Story(NamedTuple):
    """A story and its information, -log of its probability, in nats."""

    text: str
    nats: float


def stories(seed: int, count: int | None = None) -> Iterator[Story]:
    """Draw stories, one at a time; the same seed gives the same stories, and fewer are the beginning of more.

    Args:
        seed: not negative (Python's generator would take -1 for 1).
        count: how many stories; None for a stream without end.

    Returns:
        A lazy iterator.

    Raises:
        TypeError: seed or count is not an integer.
        ValueError: seed or count is negative.
    """
    for name, value in (("seed", seed), ("count", 0 if count is None else count)):
        if index(value) < 0:
            raise ValueError(f"{name}={value} must not be negative")
    # Of Python's generator only random() is used: choice() and sample() changed between versions.
    uniform = random.Random(index(seed)).random
    return islice(iter(lambda: story_grammar().draw(uniform), None), count)


def story_nats(text: str) -> float:
    """The information of a story in nats, -log of the probability of drawing just this text.

    Raises:
        ValueError: the text is not a story of the grammar; the message says how far it could be followed.
    """
    derivations, followed = story_grammar().parse(text)
    if not derivations:
        raise ValueError(
            f"not a story of the grammar: {followed} of its {len(text)} characters could be followed, up to "
            f"{text[max(0, followed - 20) : followed]!r}, but not {text[followed : followed + 20]!r} after it"
        )
    assert len(derivations) == 1, f"{len(derivations)} derivations of {text!r}: the grammar is ambiguous"
    return derivations[0]


def num_stories() -> int:
    """The number of distinct stories, exactly."""
    return _count_of_stories()[0]


def entropy_nats() -> float:
    """The mean information of a story in nats, exactly: the floor of any model's mean loss per story."""
    return _count_of_stories()[1]


@cache
def _count_of_stories() -> tuple[int, float]:
    return story_grammar().count()


@cache
def story_grammar() -> Grammar:
    """The grammar of `story_words.py`, compiled at the first call."""
    return Grammar(RULES, WORDS, DRAWN_FROM)


@dataclass(frozen=True, eq=False, slots=True)
class Choice:
    """A choice between options, which are words or sequences of parts.

    Option i is taken when a uniform number from [0, 1) falls between cuts[i - 1] and cuts[i].
    """

    options: tuple
    probabilities: tuple[float, ...]
    cuts: tuple[float, ...]
    nats: tuple[float, ...]


@dataclass(frozen=True, eq=False, slots=True)
class Switch:
    """A choice that depends on a form of a remembered word: one case for each text that the form can have."""

    variable: str
    form: str
    cases: dict[str, Choice]


@dataclass(frozen=True, eq=False, slots=True)
class Mention:
    """A form of a remembered word, which is drawn from the source when it is mentioned first."""

    variable: str
    form: str
    source: Choice | Switch


Part = str | Mention | Choice | Switch
Bound = Mapping[str, Word]
Chain = tuple[Part, Any] | None
Known = frozenset[tuple[str, frozenset[tuple[str, str]]]]

_TOKEN = re.compile(r"{(?P<variable>\w+)\.?(?P<form>\w*)}|<(?P<rule>[^>]+)>|(?P<mark>[\[|\]])|(?P<text>[^{<\[|\]]+)")


class Grammar:
    """A probabilistic grammar without recursion, whose stories remember words.

    Args:
        rules: alternatives of each rule, in the notation that `story_words.py` explains; "story" is the start.
        words: the lists that remembered words are drawn from.
        drawn_from: for a remembered word that is not drawn from the list of its own name, the name of the list; it
            may contain a form of another word, as in "{hero.opposite}".

    Raises:
        KeyError: a template names a rule, list or form that is not there.
    """

    def __init__(
        self, rules: Mapping[str, Sequence[str]], words: Mapping[str, Sequence[Word]], drawn_from: Mapping[str, str]
    ):
        self._rules, self._words, self._drawn_from = rules, words, drawn_from
        self._compiled: dict[tuple[str, str], Choice | Switch] = {}
        # For each variable, the forms that some switch looks at: all that the rest of a story can depend on.
        self._decisive: dict[str, set[str]] = defaultdict(set)
        self.start = self._rule("story")

    # --- compiling

    def _rule(self, name: str) -> Choice | Switch:
        """A rule's choice between its alternatives."""
        if "{" in name:
            return self._switch(name, self._rule)
        return self._once("rule", name, lambda: self._alternatives(_TOKEN.finditer("|".join(self._rules[name]))))

    def _source(self, variable: str) -> Choice | Switch:
        """What a variable is drawn from."""
        name = self._drawn_from.get(variable, variable)
        return self._switch(name, self._word_list) if "{" in name else self._word_list(name)

    def _word_list(self, name: str) -> Choice | Switch:
        """A list of words, where each form has a twin with a capital letter under a capital name."""

        def with_capitals(word: Word) -> Word:
            return word | {form.capitalize(): text[:1].upper() + text[1:] for form, text in word.items() if form}

        def make() -> Choice:
            words = self._words[name]
            return _choice([with_capitals(word) for word in words], [int(word.get("weight", 1)) for word in words])

        return self._once("words", name, make)

    def _once(self, kind: str, name: str, make: Callable[[], Choice]) -> Choice | Switch:
        if (kind, name) not in self._compiled:
            self._compiled[kind, name] = make()
        return self._compiled[kind, name]

    def _switch(self, name: str, case: Callable[[str], Any]) -> Switch:
        """A name with a form in it, such as `spot {place.kind}`: one case for each text of the form."""
        slot = _TOKEN.search(name, name.index("{"))
        assert slot is not None
        variable, form = slot["variable"], slot["form"]
        self._decisive[variable].add(form)
        source = self._source(variable)
        lists = source.cases.values() if isinstance(source, Switch) else [source]
        texts = {word[form] for choice in lists for word in choice.options}
        return Switch(variable, form, {text: case(name.replace(slot[0], text)) for text in sorted(texts)})

    def _alternatives(self, tokens: Iterator[re.Match]) -> Choice:
        """The choice that is written up to the next closing bracket, or to the end."""
        alternatives: list[list[Part]] = [[]]
        for token in tokens:
            if token["variable"]:
                source = self._source(token["variable"])
                alternatives[-1].append(Mention(token["variable"], token["form"], source))
            elif token["rule"]:
                alternatives[-1].append(self._rule(token["rule"]))
            elif token["text"]:
                alternatives[-1].append(token["text"])
            elif token["mark"] == "[":
                alternatives[-1].append(self._alternatives(tokens))
            elif token["mark"] == "|":
                alternatives.append([])
            else:
                break
        weights = [_take_weight(parts) for parts in alternatives]
        return _choice([tuple(parts) for parts in alternatives], weights)

    # --- drawing

    def draw(self, uniform: Callable[[], float]) -> Story:
        """Draw a story.

        Args:
            uniform: returns the next random number from [0, 1).
        """
        text: list[str] = []
        nats = _write(self.start, {}, text, uniform)
        return Story("".join(text), nats)

    # --- parsing

    def parse(self, text: str) -> tuple[list[float], int]:
        """Search for all derivations of a text.

        Returns:
            The information of each derivation in nats, and how many characters of the text could be followed.
        """
        derivations = []
        followed = 0
        # Each attempt: how far it is, what is still to come, the words it remembers, its information.
        attempts: list[tuple[int, Chain, Bound, float]] = [(0, (self.start, None), {}, 0.0)]
        while attempts:
            position, chain, bound, nats = attempts.pop()
            followed = max(followed, position)
            if chain is None:
                if position == len(text):
                    derivations.append(nats)
                continue
            part, rest = chain
            if isinstance(part, Mention) and part.variable in bound:
                part = bound[part.variable][part.form]
            if isinstance(part, str):
                if text.startswith(part, position):
                    attempts.append((position + len(part), rest, bound, nats))
                else:
                    followed = max(followed, position + _common_length(part, text[position : position + len(part)]))
                continue
            choice = _resolve(part.source if isinstance(part, Mention) else part, bound)
            for option, cost in zip(choice.options, choice.nats, strict=True):
                if not isinstance(part, Mention):
                    attempts.append((position, _chain(option, rest), bound, nats + cost))
                elif text.startswith(option[part.form], position):
                    now = position + len(option[part.form])
                    attempts.append((now, rest, {**bound, part.variable: option}, nats + cost))
        return derivations, followed

    # --- counting

    def count(self) -> tuple[int, float]:
        """The number of derivations, and their mean information in nats.

        The grammar is walked once, by all derivations at the same time. Those whose remembered words agree in all
        that decides the rest go on as one group, of which the number, probability and information are kept.
        """
        groups = self._walk((self.start,), {frozenset(): _Group(1, 1.0, 0.0)}).values()
        return sum(group.number for group in groups), sum(group.nats for group in groups)

    def _walk(self, parts: Sequence[Part], groups: dict[Known, _Group]) -> dict[Known, _Group]:
        for part in parts:
            if isinstance(part, str):
                continue
            after: dict[Known, _Group] = defaultdict(lambda: _Group(0, 0.0, 0.0))
            for known, group in groups.items():
                for state, more in self._step(part, known, group):
                    after[state] = after[state].joined_by(more)
            groups = after
        return groups

    def _step(self, part: Mention | Choice | Switch, known: Known, group: _Group) -> Iterator[tuple[Known, _Group]]:
        """The groups that one group splits into at a part."""
        bound = {variable: dict(forms) for variable, forms in known}
        if isinstance(part, Mention) and part.variable in bound:
            yield known, group
            return
        choice = _resolve(part.source if isinstance(part, Mention) else part, bound)
        for option, probability, cost in zip(choice.options, choice.probabilities, choice.nats, strict=True):
            reached = group.probability * probability
            taken = _Group(group.number, reached, group.nats * probability + reached * cost)
            if isinstance(part, Mention):
                forms = frozenset((form, option[form]) for form in self._decisive[part.variable])
                yield known | {(part.variable, forms)}, taken
            else:
                yield from self._walk(option, {known: taken}).items()


class _Group(NamedTuple):
    """Unfinished derivations: how many, their total probability, and their information weighted by it."""

    number: int
    probability: float
    nats: float

    def joined_by(self, more: _Group) -> _Group:
        return _Group(self.number + more.number, self.probability + more.probability, self.nats + more.nats)


def _choice(options: list, weights: list[int]) -> Choice:
    total = sum(weights)
    probabilities = tuple(weight / total for weight in weights)
    cuts = tuple(weight / total for weight in accumulate(weights))[:-1]
    return Choice(tuple(options), probabilities, cuts, tuple(-math.log(p) for p in probabilities))


def _take_weight(parts: list[Part]) -> int:
    """Remove the `3*` that an alternative may start with, and return its number."""
    first = parts[0] if parts else None
    weight = re.match(r"(\d+)\*", first) if isinstance(first, str) else None
    if not weight:
        return 1
    parts[0] = weight.string[weight.end() :]
    return int(weight[1])


def _write(choice: Choice | Switch, bound: dict[str, Word], text: list[str], uniform: Callable[[], float]) -> float:
    """Take a choice and write what follows from it; remember words in `bound`; return the information."""
    choice = _resolve(choice, bound)
    taken = bisect(choice.cuts, uniform())
    nats = choice.nats[taken]
    for part in choice.options[taken]:
        if isinstance(part, str):
            text.append(part)
        elif isinstance(part, Mention):
            if part.variable not in bound:
                source = _resolve(part.source, bound)
                drawn = bisect(source.cuts, uniform())
                nats += source.nats[drawn]
                bound[part.variable] = source.options[drawn]
            text.append(bound[part.variable][part.form])
        else:
            nats += _write(part, bound, text, uniform)
    return nats


def _resolve(choice: Choice | Switch, bound: Bound) -> Choice:
    return choice.cases[bound[choice.variable][choice.form]] if isinstance(choice, Switch) else choice


def _chain(parts: Sequence[Part], rest: Chain) -> Chain:
    """The parts as a linked list in front of the rest, which many attempts can share."""
    for part in reversed(parts):
        rest = (part, rest)
    return rest


def _common_length(left: str, right: str) -> int:
    """How many characters two texts have in common at their start."""
    return next((i for i, pair in enumerate(zip(left, right, strict=False)) if pair[0] != pair[1]), len(right))
