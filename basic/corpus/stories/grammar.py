"""The embedded corpus: short stories sampled from a probabilistic grammar, each with its exact information in nats.

`stories.toml` has the rules and the words. `Grammar` compiles them once and uses them in three ways:

    sample   every choice has a known probability; a story's information is the sum of -log p over its choices
    parse    finds all derivations of a text, and so computes the same number from the text alone
    count    computes the number of stories and their mean information exactly, without sampling

The grammar is unambiguous: no story has two derivations. So the information of a story is exactly -log of its
probability. The mean over all stories is the entropy of the source, and no model can have a smaller expected loss.
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

from basic.common.errors import InvalidInputError
from basic.corpus.stories.words import DRAWN_FROM, RULES, WORDS, Word


class Story(NamedTuple):
    """A story and its information, -log of its probability, in nats."""

    text: str
    nats: float


def stories(seed: int, count: int | None = None) -> Iterator[Story]:
    """Sample stories. The same seed gives the same stories; a smaller count gives the first of them.

    Args:
        seed: at least 0 (Python's generator treats -1 like 1).
        count: the number of stories; None for an endless stream.

    Returns:
        A lazy iterator.

    Raises:
        TypeError: seed or count is not an integer.
        InvalidInputError: seed or count is negative.
    """
    for name, value in (("seed", seed), ("count", 0 if count is None else count)):
        if index(value) < 0:
            raise InvalidInputError(f"{name}={value} must not be negative")
    # Of Python's generator only random() is used: choice() and sample() have changed between versions.
    uniform = random.Random(index(seed)).random
    return islice(iter(lambda: story_grammar().sample(uniform), None), count)


def story_nats(text: str) -> float:
    """Return the information of a story in nats: -log of the probability that this text is sampled.

    Raises:
        InvalidInputError: the text is not a story of the grammar; the message says where it stops being one.
    """
    derivations, prefix_length = story_grammar().parse(text)
    if not derivations:
        raise InvalidInputError(
            f"not a story of the grammar: it can begin with {prefix_length} of the {len(text)} characters, up to "
            f"{text[max(0, prefix_length - 20) : prefix_length]!r}, but {text[prefix_length : prefix_length + 20]!r} "
            "cannot follow"
        )
    assert len(derivations) == 1, f"{len(derivations)} derivations of {text!r}: the grammar is ambiguous"
    return derivations[0]


@cache
def story_grammar() -> Grammar:
    """Return the grammar of `stories.toml`, compiled at the first call."""
    return Grammar(RULES, WORDS, DRAWN_FROM)


@dataclass(frozen=True, eq=False, slots=True)
class Rule:
    """Alternatives with probabilities. An alternative is a sequence of symbols, or a word of a word list.

    Alternative i is chosen if a uniform number from [0, 1) is from thresholds[i - 1] to thresholds[i].
    """

    alternatives: tuple
    probabilities: tuple[float, ...]
    thresholds: tuple[float, ...]
    nats: tuple[float, ...]


@dataclass(frozen=True, eq=False, slots=True)
class ConditionalRule:
    """A rule that depends on a form of a variable's word: one rule for each text that the form can have."""

    variable: str
    form: str
    cases: dict[str, Rule]


@dataclass(frozen=True, eq=False, slots=True)
class VariableReference:
    """A form of a variable's word. The first reference in a story binds the variable to a word of the source."""

    variable: str
    form: str
    source: Rule | ConditionalRule


Symbol = str | VariableReference | Rule | ConditionalRule  # a string is a terminal
Bindings = Mapping[str, Word]  # of the variables that are bound so far
Stack = tuple[Symbol, Any] | None  # the symbols that are still to be derived, as a linked list
State = frozenset[tuple[str, frozenset[tuple[str, str]]]]  # the bindings, reduced to the forms that rules depend on

_TOKEN = re.compile(r"{(?P<variable>\w+)\.?(?P<form>\w*)}|<(?P<rule>[^>]+)>|(?P<mark>[\[|\]])|(?P<text>[^{<\[|\]]+)")


class Grammar:
    """A probabilistic context-free grammar without recursion, extended by variables that are bound to words.

    Args:
        rules: the alternatives of each rule, in the notation of `stories.toml`; the start rule is "story".
        words: the word lists that variables are bound from.
        drawn_from: the name of a variable's word list, if it is not the variable's own name; it may contain a form of
            another variable, as in "{hero.opposite}".

    Raises:
        KeyError: a template refers to a rule, word list or form that does not exist.
    """

    def __init__(
        self, rules: Mapping[str, Sequence[str]], words: Mapping[str, Sequence[Word]], drawn_from: Mapping[str, str]
    ):
        self._rules, self._words, self._drawn_from = rules, words, drawn_from
        self._compiled: dict[tuple[str, str], Rule | ConditionalRule] = {}
        # For each variable the forms that conditional rules depend on: nothing else decides how a story continues.
        self._decisive_forms: dict[str, set[str]] = defaultdict(set)
        self.start = self._rule("story")

    # --- compile

    def _rule(self, name: str) -> Rule | ConditionalRule:
        if "{" in name:
            return self._conditional_rule(name, self._rule)

        def compile_rule() -> Rule:
            return self._alternatives(_TOKEN.finditer("|".join(self._rules[name])))

        return self._compile_once("rule", name, compile_rule)

    def _source(self, variable: str) -> Rule | ConditionalRule:
        """The word list of a variable."""
        name = self._drawn_from.get(variable, variable)
        return self._conditional_rule(name, self._word_list) if "{" in name else self._word_list(name)

    def _word_list(self, name: str) -> Rule | ConditionalRule:
        """A word list as a rule. For each form there is one more under a capitalized name, with a capital letter."""

        def with_capitals(word: Word) -> Word:
            return word | {form.capitalize(): text[:1].upper() + text[1:] for form, text in word.items() if form}

        def compile_list() -> Rule:
            weights = [int(word.get("weight", 1)) for word in self._words[name]]
            return _weighted_rule(list(map(with_capitals, self._words[name])), weights)

        return self._compile_once("words", name, compile_list)

    def _compile_once(self, kind: str, name: str, compile_rule: Callable[[], Rule]) -> Rule | ConditionalRule:
        if (kind, name) not in self._compiled:
            self._compiled[kind, name] = compile_rule()
        return self._compiled[kind, name]

    def _conditional_rule(self, name: str, case: Callable[[str], Any]) -> ConditionalRule:
        """A name that contains a form, such as `spot {place.kind}`: one case for each text of the form."""
        placeholder = _TOKEN.search(name, name.index("{"))
        assert placeholder is not None
        variable, form = placeholder["variable"], placeholder["form"]
        self._decisive_forms[variable].add(form)
        source = self._source(variable)
        lists = source.cases.values() if isinstance(source, ConditionalRule) else [source]
        texts = {word[form] for rule in lists for word in rule.alternatives}
        cases = {text: case(name.replace(placeholder[0], text)) for text in sorted(texts)}
        return ConditionalRule(variable, form, cases)

    def _alternatives(self, tokens: Iterator[re.Match]) -> Rule:
        """Parse alternatives up to the next closing bracket, or to the end."""
        alternatives: list[list[Symbol]] = [[]]
        for token in tokens:
            if token["variable"]:
                source = self._source(token["variable"])
                alternatives[-1].append(VariableReference(token["variable"], token["form"], source))
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
        weights = [_pop_weight(symbols) for symbols in alternatives]
        return _weighted_rule([tuple(symbols) for symbols in alternatives], weights)

    # --- sample

    def sample(self, uniform: Callable[[], float]) -> Story:
        """Sample a story.

        Args:
            uniform: returns the next random number from [0, 1).
        """
        text: list[str] = []
        nats = _derive(self.start, {}, text, uniform)
        return Story("".join(text), nats)

    # --- parse

    def parse(self, text: str) -> tuple[list[float], int]:
        """Find all derivations of a text.

        Returns:
            The information of each derivation in nats, and the length of the longest prefix of the text with which a
            derivation can begin.
        """
        derivations = []
        prefix_length = 0
        # Each configuration: position in the text, symbols still to be derived, bindings, information so far.
        configurations: list[tuple[int, Stack, Bindings, float]] = [(0, (self.start, None), {}, 0.0)]
        while configurations:
            position, stack, bindings, nats = configurations.pop()
            prefix_length = max(prefix_length, position)
            if stack is None:
                if position == len(text):
                    derivations.append(nats)
                continue
            symbol, rest = stack
            if isinstance(symbol, VariableReference) and symbol.variable in bindings:
                symbol = bindings[symbol.variable][symbol.form]
            if isinstance(symbol, str):
                if text.startswith(symbol, position):
                    configurations.append((position + len(symbol), rest, bindings, nats))
                else:
                    common_length = _common_prefix_length(symbol, text[position : position + len(symbol)])
                    prefix_length = max(prefix_length, position + common_length)
                continue
            rule = _resolve(symbol.source if isinstance(symbol, VariableReference) else symbol, bindings)
            for alternative, cost in zip(rule.alternatives, rule.nats, strict=True):
                if not isinstance(symbol, VariableReference):
                    configurations.append((position, _push(alternative, rest), bindings, nats + cost))
                elif text.startswith(alternative[symbol.form], position):
                    end = position + len(alternative[symbol.form])
                    configurations.append((end, rest, {**bindings, symbol.variable: alternative}, nats + cost))
        return derivations, prefix_length

    # --- count

    def count(self) -> tuple[int, float]:
        """Return the number of derivations and their mean information in nats.

        All derivations advance through the grammar together. Those in the same state continue in the same ways, so they
        are one group, of which only the number, the probability and the information are needed.
        """
        groups = self._advance((self.start,), {frozenset(): _Group(1, 1.0, 0.0)}).values()
        return sum(group.number for group in groups), sum(group.nats for group in groups)

    def _advance(self, symbols: Sequence[Symbol], groups: dict[State, _Group]) -> dict[State, _Group]:
        """The groups after some symbols."""
        for symbol in symbols:
            if isinstance(symbol, str):
                continue
            after: dict[State, _Group] = defaultdict(lambda: _Group(0, 0.0, 0.0))
            for state, group in groups.items():
                for new_state, part in self._split(symbol, state, group):
                    after[new_state] = after[new_state].merged_with(part)
            groups = after
        return groups

    def _split(
        self, symbol: VariableReference | Rule | ConditionalRule, state: State, group: _Group
    ) -> Iterator[tuple[State, _Group]]:
        """The groups that one group splits into at a symbol."""
        bindings = {variable: dict(forms) for variable, forms in state}
        if isinstance(symbol, VariableReference) and symbol.variable in bindings:
            yield state, group
            return
        rule = _resolve(symbol.source if isinstance(symbol, VariableReference) else symbol, bindings)
        for alternative, probability, cost in zip(rule.alternatives, rule.probabilities, rule.nats, strict=True):
            joint_probability = group.probability * probability
            chosen = _Group(group.number, joint_probability, group.nats * probability + joint_probability * cost)
            if isinstance(symbol, VariableReference):
                forms = frozenset((form, alternative[form]) for form in self._decisive_forms[symbol.variable])
                yield state | {(symbol.variable, forms)}, chosen
            else:
                yield from self._advance(alternative, {state: chosen}).items()


class _Group(NamedTuple):
    """Unfinished derivations: their number, their total probability, and their information weighted by probability."""

    number: int
    probability: float
    nats: float

    def merged_with(self, other: _Group) -> _Group:
        return _Group(self.number + other.number, self.probability + other.probability, self.nats + other.nats)


def _weighted_rule(alternatives: list, weights: list[int]) -> Rule:
    total = sum(weights)
    probabilities = tuple(weight / total for weight in weights)
    thresholds = tuple(weight / total for weight in accumulate(weights))[:-1]
    return Rule(tuple(alternatives), probabilities, thresholds, tuple(-math.log(p) for p in probabilities))


def _pop_weight(symbols: list[Symbol]) -> int:
    """Remove the `3*` with which an alternative may begin, and return its number."""
    first = symbols[0] if symbols else None
    weight = re.match(r"(\d+)\*", first) if isinstance(first, str) else None
    if not weight:
        return 1
    symbols[0] = weight.string[weight.end() :]
    return int(weight[1])


def _derive(
    rule: Rule | ConditionalRule, bindings: dict[str, Word], text: list[str], uniform: Callable[[], float]
) -> float:
    """Choose an alternative and append its derivation to `text`; add to `bindings`; return the information."""
    rule = _resolve(rule, bindings)
    chosen = bisect(rule.thresholds, uniform())
    nats = rule.nats[chosen]
    for symbol in rule.alternatives[chosen]:
        if isinstance(symbol, str):
            text.append(symbol)
        elif isinstance(symbol, VariableReference):
            if symbol.variable not in bindings:
                source = _resolve(symbol.source, bindings)
                word = bisect(source.thresholds, uniform())
                nats += source.nats[word]
                bindings[symbol.variable] = source.alternatives[word]
            text.append(bindings[symbol.variable][symbol.form])
        else:
            nats += _derive(symbol, bindings, text, uniform)
    return nats


def _resolve(rule: Rule | ConditionalRule, bindings: Bindings) -> Rule:
    return rule.cases[bindings[rule.variable][rule.form]] if isinstance(rule, ConditionalRule) else rule


def _push(symbols: Sequence[Symbol], stack: Stack) -> Stack:
    """Push symbols, the first on top; the rest of the stack is shared, not copied."""
    for symbol in reversed(symbols):
        stack = (symbol, stack)
    return stack


def _common_prefix_length(left: str, right: str) -> int:
    return next((i for i, pair in enumerate(zip(left, right, strict=False)) if pair[0] != pair[1]), len(right))
