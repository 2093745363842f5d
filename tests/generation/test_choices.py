"""What users add to sampling: min-p, penalties, several samples, log-probabilities and stop strings."""

import itertools
import math
from typing import Any

import pytest
import torch

from basic.bpe.stream_decoder import StreamDecoder
from basic.common.errors import InvalidInputError
from basic.generation.continuation import continue_ids, generate
from basic.generation.decoder import Decoder
from basic.generation.sampling import Sampling, next_token_probabilities
from basic.generation.text import StopStrings, complete, stream
from basic.model import KVCache, TransformerLM
from tests.helpers.model_tools import decided_model

VOCAB = 11
PROMPTS = [[3], [1, 4, 1, 5], [2, 6]]


@pytest.fixture(scope="module")
def model() -> TransformerLM:
    return decided_model(5, vocab_size=VOCAB, context_length=16)


def penalized_by_hand(logits: list[float], prompt: list[int], new: list[int], repetition: float, frequency: float):
    """Id by id, as the two papers and OpenAI's documentation define it."""
    result = []
    for token, logit in enumerate(logits):
        if token in prompt or token in new:
            logit = logit / repetition if logit > 0 else logit * repetition
        result.append(logit - frequency * new.count(token))
    return result


@torch.no_grad()
def continue_by_hand(model, prompt, count, repetition=1.0, frequency=0.0) -> tuple[list[int], list[float]]:
    """Greedy ids with penalties, a full forward pass for each, and the logarithms of their probabilities."""
    new: list[int] = []
    logarithms = []
    for _ in range(count):
        logits = model(torch.tensor([[*prompt, *new]]))[0, -1].double()
        scores = penalized_by_hand(logits.tolist(), prompt, new, repetition, frequency)
        new.append(scores.index(max(scores)))
        logarithms.append((logits[new[-1]] - logits.logsumexp(0)).item())
    return new, logarithms


# --- The choice of a token --------------------------------------------------------------------------------------


@pytest.mark.parametrize("min_p", [0.01, 0.2, 0.7, 1.0])
@pytest.mark.parametrize("others", [{}, {"top_k": 5, "top_p": 0.9}, {"temperature": 0.5}], ids=str)
def test_min_p_keeps_the_tokens_with_a_share_of_the_largest_probability(min_p, others):
    logits = 2 * torch.randn(4, 50, generator=torch.Generator().manual_seed(1))
    before = next_token_probabilities(logits, **others)
    actual = next_token_probabilities(logits, min_p=min_p, **others)
    for row, expected in zip(actual.tolist(), before.tolist(), strict=True):
        kept = [p if p >= min_p * max(expected) else 0.0 for p in expected]
        assert row == pytest.approx([p / sum(kept) for p in kept])
        assert 1 <= sum(p > 0 for p in row) < 50


@pytest.mark.parametrize("penalties", [(1.3, 0.0), (1.0, 0.7), (1.5, 0.4), (0.8, -0.2)], ids=str)
@pytest.mark.parametrize("use_cache", [True, False])
def test_penalties_are_those_by_hand_also_for_prompts_of_several_lengths(model, penalties, use_cache):
    names = dict(zip(("repetition_penalty", "frequency_penalty"), penalties, strict=True))
    expected = [continue_by_hand(model, prompt, 11, *penalties)[0] for prompt in PROMPTS]
    assert generate(model, PROMPTS, 11, temperature=0.0, use_cache=use_cache, **names) == expected
    assert expected != generate(model, PROMPTS, 11, temperature=0.0)  # else the test would prove nothing


def test_penalties_and_truncations_are_those_of_transformers():
    processors = pytest.importorskip("transformers.generation.logits_process", reason="transformers is an oracle")
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(8, 40, generator=generator)
    ids = torch.randint(40, (8, 12), generator=generator)
    settings = Sampling(temperature=0.7, top_k=20, top_p=0.9, min_p=0.05, repetition_penalty=1.4)
    actual = settings.probabilities(settings.penalized(logits, ids, torch.zeros_like(ids, dtype=torch.bool)))
    expected = processors.RepetitionPenaltyLogitsProcessor(1.4)(ids, logits.clone())
    for warper in (
        processors.TemperatureLogitsWarper(0.7),
        processors.TopKLogitsWarper(20),
        processors.TopPLogitsWarper(0.9),
        processors.MinPLogitsWarper(0.05),
    ):
        expected = warper(ids, expected)
    torch.testing.assert_close(actual, expected.softmax(-1))


def test_greedy_decoding_with_kernels_does_not_forget_the_penalties(model):
    """A decoder that takes the likeliest ids itself is used only where nothing else is asked for."""

    class Likeliest(Decoder):
        chooses = True

        def choose(self, ids, length, most):
            raise AssertionError("it knows no penalties")

    sampling, logarithms = Sampling(temperature=0.0, frequency_penalty=0.5), [[]]
    options: dict[str, Any] = {"make_decoder": lambda *_: Likeliest(model, KVCache(model.config, 1))}
    options |= {"end_id": None, "vocab_size": None, "log_probabilities": logarithms}
    steps = continue_ids(model, [[3, 1]], 8, sampling, **options)
    ids, expected = continue_by_hand(model, [3, 1], 8, 1.0, 0.5)
    assert [token for (new,) in steps for token in new] == ids
    assert logarithms[0] == pytest.approx(expected, rel=1e-4)


# --- Several samples, and their probabilities -------------------------------------------------------------------


def test_samples_of_a_prompt_are_those_of_the_prompt_given_several_times(model):
    several = generate(model, PROMPTS, 6, num_samples=3, seed=1)
    assert several == generate(model, [prompt for prompt in PROMPTS for _ in range(3)], 6, seed=1)
    assert len(several) == 9
    assert several[0] != several[1]
    texts = complete(model, Letters(), ["d", "bb"], 6, num_samples=2, seed=1)
    assert texts == complete(model, Letters(), ["d", "d", "bb", "bb"], 6, seed=1)


def test_log_probabilities_are_the_models_own(model):
    ids, logarithms = generate(model, PROMPTS, 9, temperature=0.0, frequency_penalty=0.9, log_probabilities=True)
    for prompt, new, actual in zip(PROMPTS, ids, logarithms, strict=True):
        expected = continue_by_hand(model, prompt, 9, 1.0, 0.9)
        assert new == expected[0]
        assert actual == pytest.approx(expected[1], rel=1e-4)
    end = ids[0][4]
    cut, shorter = generate(
        model, PROMPTS, 9, temperature=0.0, frequency_penalty=0.9, log_probabilities=True, end_id=end
    )
    assert list(map(len, cut)) == list(map(len, shorter))
    assert len(cut[0]) < 9
    assert shorter[0] == logarithms[0][: len(cut[0])]


def test_log_probabilities_are_of_the_tokenizers_ids_alone(model):
    ids, logarithms = generate(model, [[3]], 5, temperature=2.0, seed=0, vocab_size=2, log_probabilities=True)
    logits = model(torch.tensor([[3, *ids[0]]]))[0, :-1, :2]
    expected = logits.log_softmax(-1)[range(5), ids[0]]
    assert logarithms[0] == pytest.approx(expected.tolist(), rel=1e-4)


# --- Stop strings -----------------------------------------------------------------------------------------------


class Letters:
    """A tokenizer of the letters a to k."""

    vocab_size = VOCAB
    special_token_ids: dict[str, int] = {}  # noqa: RUF012

    def encode(self, text: str) -> list[int]:
        return [ord(letter) - ord("a") for letter in text]

    def decode(self, ids) -> str:
        return "".join(chr(ord("a") + i) for i in ids)

    def stream_decoder(self) -> StreamDecoder:
        return StreamDecoder(lambda ids: self.decode(ids).encode())


def up_to_stop(text: str, stop: list[str]) -> str:
    """The stop string that is complete first, character by character."""
    for end in range(len(text) + 1):
        for each in sorted(stop, key=len, reverse=True):
            if text[:end].endswith(each):
                return text[: end - len(each)]
    return text


@pytest.mark.parametrize("stop", [["ab"], ["aab", "b"], ["abc", "b"], ["aaa"], ["c", "ab"], ["abab"], []], ids=str)
def test_chunks_end_before_the_stop_string_and_show_no_part_of_one(stop):
    for letters in itertools.product("abc", repeat=5):
        text = "".join(letters)
        expected = up_to_stop(text, stop)
        for cuts in itertools.product([False, True], repeat=4):
            chunks = "".join(c + "|" * cut for c, cut in zip(text, (*cuts, False), strict=True)).split("|")
            strings, shown = StopStrings(stop), ""
            for number, chunk in enumerate(chunks, 1):
                shown += strings.add(chunk)
                so_far = "".join(chunks[:number])
                assert expected.startswith(shown)
                # Nothing is held back that no stop string can begin with.
                held = so_far[len(shown) :]
                assert strings.found or not held or any(each.startswith(held) for each in stop)
            assert shown + strings.finish() == expected
            assert strings.found == (expected != text)


def test_texts_and_streams_end_before_a_stop_string(model):
    settings: dict[str, Any] = {"temperature": 0.9, "seed": 2}
    letters, prompts = Letters(), ["d", "bebf", "cg"]
    full = complete(model, letters, prompts, 12, **settings)
    stop = [full[0][3:5], full[1][6:8], "zz"]
    expected = [up_to_stop(text, stop) for text in full]
    assert [len(text) < 12 for text in expected] == [True, True, expected[2] != full[2]]
    assert complete(model, letters, prompts, 12, stop=stop, **settings) == expected
    (alone,) = complete(model, letters, ["d"], 12, **settings)
    assert "".join(stream(model, letters, "d", 12, stop=alone[4:6], **settings)) == up_to_stop(alone, [alone[4:6]])
    assert complete(model, letters, ["d"], 12, stop=iter([alone[4:6]]), **settings) == [up_to_stop(alone, [alone[4:6]])]


def test_a_sequence_that_met_its_stop_string_is_not_computed_further(model, monkeypatch):
    (text,) = complete(model, Letters(), ["d"], 12, temperature=0.0)
    calls = []
    monkeypatch.setattr(model, "forward", lambda *args, old=model.forward: calls.append(1) or old(*args))
    complete(model, Letters(), ["d"], 12, temperature=0.0, stop=text[2:4])
    assert len(calls) == len(up_to_stop(text, [text[2:4]])) + 2


@pytest.mark.parametrize(("stop", "error"), [("", InvalidInputError), (["a", ""], InvalidInputError), ([3], TypeError)])
def test_a_wrong_stop_string_is_refused_at_once(model, stop, error, monkeypatch):
    import jaxtyping

    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # type checks would fail first
    with pytest.raises(error, match="stop"):
        stream(model, Letters(), "a", 3, stop=stop)


def test_penalties_keep_nan(model):
    logits = torch.tensor([[0.0, math.nan, 1.0]])
    penalized = Sampling(repetition_penalty=2.0).penalized(logits, torch.tensor([[2]]), torch.tensor([[True]]))
    assert Sampling(temperature=0).draw(penalized).tolist() == [-1]
