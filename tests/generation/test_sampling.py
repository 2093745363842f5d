"""The distribution of the next token against one in float64; min-p, penalties, log-probabilities, stop strings."""

import itertools
import math
from typing import Any

import numpy as np
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


def probabilities_by_hand(logits, temperature=1.0, top_k=None, top_p=None) -> np.ndarray:
    """The distribution for one vector of logits, id by id, in float64."""
    order = sorted(range(len(logits)), key=lambda i: -logits[i])
    if top_k is not None:
        order = order[:top_k]
    weights = {i: math.exp((logits[i] - logits[order[0]]) / temperature) for i in order}
    total = sum(weights.values())
    kept, mass = [], 0.0
    for i in order:
        kept.append(i)
        mass += weights[i] / total
        if top_p is not None and mass >= top_p:
            break
    result = np.zeros(len(logits))
    for i in kept:
        result[i] = weights[i] / sum(weights[j] for j in kept)
    return result


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.0])
@pytest.mark.parametrize("top_k", [None, 1, 5, 23, 100])
@pytest.mark.parametrize("top_p", [None, 0.01, 0.5, 0.9, 0.999])
def test_distribution_against_the_one_by_hand(temperature, top_k, top_p):
    logits = 3 * torch.randn(4, 23, generator=torch.Generator().manual_seed(1))
    settings: dict[str, Any] = {"temperature": temperature, "top_k": top_k, "top_p": top_p}
    expected = np.stack([probabilities_by_hand(row.tolist(), **settings) for row in logits])
    actual = next_token_probabilities(logits, **settings).numpy()
    np.testing.assert_array_equal(actual > 0, expected > 0)
    np.testing.assert_allclose(actual, expected, rtol=1e-5)


@pytest.mark.parametrize(
    ("top_p", "size"), [(1e-50, 1), (0.1, 1), (0.25, 1), (0.2501, 2), (0.5, 2), (0.75, 3), (0.76, 4)]
)
def test_top_p_takes_the_smallest_set_that_reaches_it_and_of_equals_the_first(top_p, size):
    logits = torch.tensor([-90.0, 1.0, 1.0, 1.0, 1.0])  # a quarter each, exact in binary
    expected = [0.0] + [1 / size] * size + [0.0] * (4 - size)
    assert next_token_probabilities(logits, top_p=top_p).tolist() == pytest.approx(expected)


def test_top_p_takes_the_first_of_many_equals():
    kept = next_token_probabilities(torch.zeros(4096), top_p=0.25) > 0
    assert kept.nonzero().flatten().tolist() == list(range(1024))


def test_top_k_keeps_k_ids_also_among_equal_ones():
    logits = torch.tensor([[0.0, 2.0, 2.0, 2.0, 1.0], [1.0, 1.0, 1.0, 1.0, 1.0]])
    probabilities = next_token_probabilities(logits, top_k=2)
    assert (probabilities > 0).sum(-1).tolist() == [2, 2]
    assert probabilities[probabilities > 0].tolist() == [0.5] * 4
    assert probabilities[0, [0, 4]].tolist() == [0.0, 0.0]


def test_top_k_comes_before_top_p():
    logits = torch.tensor([4.0, 3.0, 2.0, 1.0]).log()  # 0.4, 0.3, 0.2, 0.1; of the first two alone 4/7, 3/7
    assert next_token_probabilities(logits, top_k=2, top_p=0.5).tolist() == [1.0, 0.0, 0.0, 0.0]


def test_top_p_of_one_keeps_all():
    logits = 4 * torch.randn(4, 50_000, generator=torch.Generator().manual_seed(0))
    assert torch.equal(next_token_probabilities(logits, top_p=1.0), next_token_probabilities(logits))


@pytest.mark.parametrize("temperature", [1e-6, 1e-39, 1e-50, 1e-300])
def test_a_temperature_near_zero_is_certain_and_divides_among_equals(temperature):
    logits = torch.tensor([[1.0, 500.0, -1000.0, 499.0], [3.0, 3.0, 0.0, -3.0]])
    assert next_token_probabilities(logits, temperature=temperature).tolist() == [[0, 1, 0, 0], [0.5, 0.5, 0, 0]]


def test_temperature_zero_takes_the_first_of_the_likeliest_and_a_large_one_any_id():
    logits = torch.tensor([1.0, 3.0, 3.0, -20.0])
    assert next_token_probabilities(logits, temperature=0).tolist() == [0, 1, 0, 0]
    assert next_token_probabilities(logits, temperature=1e9).tolist() == pytest.approx([0.25] * 4)


@pytest.mark.parametrize(
    ("dtype", "wide"), [(torch.bfloat16, torch.float32), (torch.float32, torch.float32), (torch.float64, torch.float64)]
)
def test_probabilities_are_computed_in_at_least_float32(dtype, wide):
    logits = torch.randn(1000, generator=torch.Generator().manual_seed(0)).to(dtype)
    probabilities = next_token_probabilities(logits, top_p=0.9)
    assert probabilities.dtype == wide
    assert probabilities.sum().item() == pytest.approx(1, abs=1e-5)


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


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_token_is_drawn_only_where_a_logit_is_finite_and_none_is_nan(temperature):
    none = -math.inf
    logits = torch.tensor([[none, none, none], [0.0, math.nan, 1.0], [none, none, 2.0], [none, 0.0, none]])
    assert Sampling(temperature=temperature).draw(logits).tolist() == [-1, -1, 2, 1]


def test_the_first_of_the_likeliest_tokens_is_drawn():
    assert Sampling(temperature=0).draw(torch.tensor([[1.0, 3.0, 3.0, 2.0]])).tolist() == [1]
