"""Generation against plain loops: ids, random numbers, errors, and text."""

import copy
import math
from typing import Any

import jaxtyping
import numpy as np
import pytest
import torch

from basic.bpe.stream_decoder import StreamDecoder
from basic.common.errors import InvalidInputError, WrongTokenizerError
from basic.generation.continuation import continue_ids, first_seen, generate
from basic.generation.decoder import Decoder
from basic.generation.sampling import Sampling, next_token_probabilities
from basic.generation.text import complete, stream
from basic.model import KVCache, TransformerLM
from tests.generation.test_sampling import probabilities_by_hand
from tests.helpers.model_tools import decided_model

VOCAB, CONTEXT = 23, 12
PROMPTS = [[3], [1, 4, 1, 5, 9], [2, 6, 5], list(range(17))]  # the last one is longer than the context


@pytest.fixture(scope="module", params=["rope", "none"])
def model(request) -> TransformerLM:
    return decided_model(5, vocab_size=VOCAB, context_length=CONTEXT, d_ff=None, positions=request.param)


@torch.no_grad()
def continue_by_hand(model, prompt, count, choose) -> list[int]:
    """A full forward pass for each new token; a full context loses its first half before the next token."""
    ids, seen = list(prompt), list(prompt)[-CONTEXT:]
    for _ in range(count):
        seen = seen if len(seen) <= CONTEXT else seen[CONTEXT - CONTEXT // 2 :]
        ids.append(choose(model(torch.tensor([seen]))[0, -1]))
        seen.append(ids[-1])
    return ids[len(prompt) :]


# --- Generated ids ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("prompt", PROMPTS, ids=len)
def test_greedy_is_the_argmax_of_full_forward_passes_also_beyond_the_context(model, prompt, use_cache):
    expected = continue_by_hand(model, prompt, 2 * CONTEXT, lambda logits: int(logits.argmax()))
    assert len(set(expected)) > 2  # else the test would prove nothing
    assert generate(model, [prompt], 2 * CONTEXT, temperature=0.0, use_cache=use_cache) == [expected]


def test_ragged_prompts_side_by_side_give_what_each_gives_alone(model):
    alone = [generate(model, [prompt], 20, temperature=0.0)[0] for prompt in PROMPTS]
    assert generate(model, PROMPTS, 20, temperature=0.0) == alone
    assert generate(model, PROMPTS, 20, temperature=0.0, use_cache=False) == alone


def test_shared_keys_and_values_are_cached_as_they_are():
    model = decided_model(0, vocab_size=VOCAB, context_length=CONTEXT, num_heads=4, num_kv_heads=2)
    assert KVCache(model.config, 3).keys.shape == (2, 3, 2, CONTEXT, 4)
    expected = [continue_by_hand(model, prompt, CONTEXT, lambda logits: int(logits.argmax())) for prompt in PROMPTS]
    assert len({token for ids in expected for token in ids}) > 4  # else the test would prove nothing
    assert generate(model, PROMPTS, CONTEXT, temperature=0.0) == expected


def test_draws_are_the_same_with_and_without_cache(model):
    settings: dict[str, Any] = {"temperature": 0.9, "top_k": 15, "top_p": 0.95, "seed": 3}
    with_cache = generate(model, PROMPTS, 20, **settings)
    assert with_cache == generate(model, PROMPTS, 20, use_cache=False, **settings)
    assert [len(ids) for ids in with_cache] == [20] * len(PROMPTS)


def test_a_sequence_ends_before_its_end_id_and_the_others_continue(model):
    free = generate(model, PROMPTS, 20, temperature=0.0)
    for end_id in {1, 9, *(ids[5] for ids in free)}:  # ids inside the prompts too, which end nothing
        expected = [ids[: ids.index(end_id)] if end_id in ids else ids for ids in free]
        assert generate(model, PROMPTS, 20, temperature=0.0, end_id=end_id) == expected
        assert generate(model, PROMPTS[1:2], 20, temperature=0.0, end_id=end_id) == expected[1:2]


class ChoosingDecoder(Decoder):
    """Continues sequences itself, with full forward passes."""

    cache: KVCache
    chooses = True

    def __init__(self, model, prompt_lengths, vocab_size, use_cache):
        super().__init__(model, KVCache(model.config, len(prompt_lengths)))
        self.num_known, self.vocab_size = prompt_lengths, vocab_size

    def forget(self, num_known):
        super().forget(num_known)
        self.num_known = torch.tensor(num_known)

    def choose(self, ids, length, most):
        end = min(length + most, ids.shape[1], CONTEXT + 1)
        for position in range(length, end):
            likeliest = self.model(ids[:, :position])[:, -1, : self.vocab_size].argmax(-1)
            ids[:, position] = torch.where(self.num_known > position, ids[:, position], likeliest)
            self.cache.advance(1)
        return end


@pytest.mark.parametrize("steps", [1, 3, 32])
def test_a_decoder_whose_ids_are_read_every_few_steps_gives_the_same_ids(model, steps):
    prompts = [[3], [1, 4, 1], [2, 6, 5, 3, 5]]
    free = generate(model, prompts, 20, temperature=0.0)
    ends = (None, free[0][1], free[1][4], free[2][7])
    expected = [generate(model, prompts, 20, temperature=0.0, end_id=end_id, vocab_size=19) for end_id in ends]

    def decode(sampling, end_id=None, vocab_size=None):
        options: dict[str, Any] = {"make_decoder": ChoosingDecoder, "steps_per_read": steps}
        chunks = list(continue_ids(model, prompts, 20, sampling, end_id=end_id, vocab_size=vocab_size, **options))
        return [[i for ids in sequence for i in ids] for sequence in zip(*chunks, strict=True)]

    for end_id, ids in zip(ends, expected, strict=True):
        assert decode(Sampling(temperature=0.0), end_id, vocab_size=19) == ids
    assert decode(Sampling(seed=3)) == generate(model, prompts, 20, seed=3)


@pytest.mark.parametrize("context", [1, 2, 3, 16])
def test_a_full_context_goes_on_with_its_last_half(context):
    starts = [first_seen(length, context) for length in range(1, 5 * context)]
    seen = [length - start for length, start in enumerate(starts, 1)]
    assert starts[:context] == [0] * context
    assert max(seen) == context
    assert min(seen[context:]) == context // 2 + 1
    assert len(set(starts)) <= 2 + 4 * context // (context - context // 2)


def test_the_model_reads_each_token_once_and_none_when_all_sequences_have_ended(model, monkeypatch):
    free = generate(model, [[3, 1, 2]], 8, temperature=0.0)[0]
    lengths = []
    monkeypatch.setattr(
        model, "forward", lambda ids, *args, old=model.forward: lengths.append(ids.shape[1]) or old(ids, *args)
    )
    generate(model, [[3, 1, 2]], 8, temperature=0.0, end_id=free[2])
    assert lengths == [3] + [1] * free.index(free[2])


def test_seed_repeats_the_draws_and_none_draws_afresh(model):
    def draw(seed):
        return generate(model, [[1], [1]], 16, seed=seed)

    assert draw(1) == draw(1)
    assert draw(1) != draw(2)
    assert draw(None) != draw(None)
    assert draw(1)[0] != draw(1)[1]


def test_the_global_random_state_is_neither_used_nor_touched(model):
    torch.manual_seed(0)
    before, first = torch.get_rng_state(), generate(model, [[1]], 10, seed=1)
    generate(model, [[1]], 10)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(1)
    assert generate(model, [[1]], 10, seed=1) == first


@pytest.mark.parametrize(
    "as_prompts",
    [
        torch.tensor,
        lambda prompts: np.array(prompts, dtype=np.uint16),
        lambda prompts: [torch.tensor(prompt) for prompt in prompts],
        lambda prompts: (np.array(prompt) for prompt in prompts),
        lambda prompts: tuple(map(tuple, prompts)),
    ],
    ids=["tensor", "array", "tensors", "arrays", "tuples"],
)
def test_prompts_may_be_lists_arrays_or_tensors(model, as_prompts):
    prompts = [[1, 4, 1], [5, 9, 2]]
    assert generate(model, as_prompts(prompts), 9, seed=1) == generate(model, prompts, 9, seed=1)


def test_no_prompts_or_no_new_tokens(model):
    assert generate(model, [], 5) == []
    assert generate(model, PROMPTS, 0) == [[] for _ in PROMPTS]


def test_drawn_ids_are_as_frequent_as_probable(model):
    prompt, rows = [1, 4, 1, 5, 9], 10_000
    logits = model(torch.tensor([prompt]))[0, -1]
    settings: dict[str, Any] = {"temperature": 1.5, "top_k": 12, "top_p": 0.9}
    p = probabilities_by_hand(logits.tolist(), **settings)
    drawn = generate(model, [prompt] * rows, 1, seed=0, **settings)
    counts = np.bincount(np.ravel(drawn), minlength=VOCAB)
    assert (p > 0).sum() > 4
    assert (counts[p == 0] == 0).all()
    # Hoeffding: a share is off by more than t with probability 2 exp(-2 rows t^2); t so that all 23 together are
    # off with less than one in a million.
    t = math.sqrt(math.log(2 * VOCAB / 1e-6) / (2 * rows))
    np.testing.assert_allclose(counts / rows, p, atol=t)


# --- Errors ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_new_tokens": -1}, "max_new_tokens must be at least 0, got -1"),
        ({"temperature": -0.1}, "temperature must be a number >= 0.*got -0.1"),
        ({"temperature": math.nan}, "temperature must be .*got nan"),
        ({"temperature": math.inf}, "temperature must be .*got inf"),
        ({"top_k": 0}, "top_k must be at least 1.*got 0"),
        ({"top_p": 0.0}, "top_p must be above 0 and at most 1.*got 0.0"),
        ({"top_p": 1.1}, "top_p must be .*got 1.1"),
        ({"top_p": math.nan}, "top_p must be .*got nan"),
        ({"min_p": 0.0}, "min_p must be above 0 and at most 1.*got 0.0"),
        ({"min_p": 1.5}, "min_p must be .*got 1.5"),
        ({"repetition_penalty": 0.0}, "repetition_penalty must be above 0.*got 0.0"),
        ({"frequency_penalty": math.inf}, "frequency_penalty must be .*got inf"),
        ({"num_samples": 0}, "num_samples must be at least 1, got 0"),
        ({"vocab_size": 0}, "vocab_size must be at least 1, got 0"),
        ({"vocab_size": -5}, "vocab_size must be at least 1, got -5"),
        ({"vocab_size": VOCAB + 1}, f"vocab_size must be at most {VOCAB}, .*got {VOCAB + 1}; leave it out"),
    ],
)
def test_settings_out_of_range_are_named(model, settings, message):
    arguments: dict[str, Any] = {"max_new_tokens": 3, **settings}
    with pytest.raises(InvalidInputError, match=message):
        generate(model, [[1]], **arguments)


def test_an_empty_prompt_is_named_by_its_index(model):
    with pytest.raises(InvalidInputError, match="prompt 1 has no token"):
        generate(model, [[1], []], 3)


@pytest.mark.parametrize("function", [complete, stream])
def test_a_tokenizer_that_is_larger_than_the_model_is_refused(model, function):
    with pytest.raises(WrongTokenizerError, match=f"tokenizer's {VOCAB + 1} ids do not fit .*vocab_size={VOCAB}; give"):
        function(model, Letters({}, VOCAB + 1), "a" if function is stream else ["a"], 3)


@pytest.mark.parametrize("function", [generate, complete, stream])
def test_unknown_settings_are_refused(model, function):
    arguments = (model, [[1]]) if function is generate else (model, Letters({}), "a" if function is stream else ["a"])
    with pytest.raises(TypeError, match="temprature"):
        function(*arguments, 3, temprature=0.5)


# --- Text -----------------------------------------------------------------------------------------------------


class Letters:
    """A tokenizer of the letters a to v and one special token; the rest encodes to nothing."""

    def __init__(self, special_token_ids: dict[str, int], vocab_size: int = VOCAB) -> None:
        self.special_token_ids = special_token_ids
        self.vocab_size = vocab_size

    def encode(self, text: str) -> list[int]:
        if text in self.special_token_ids:
            return [self.special_token_ids[text]]
        return [ord(letter) - ord("a") for letter in text if "a" <= letter <= "v"]

    def decode(self, ids) -> str:
        return "".join(chr(ord("a") + i) if i < 22 else "#" for i in ids)

    def stream_decoder(self) -> StreamDecoder:
        return StreamDecoder(lambda ids: self.decode(ids).encode())


def test_complete_returns_the_continuations_up_to_the_end_of_text(model):
    ids = generate(model, [[0, 1], [22]], 15, temperature=0.0)
    end = next(i for i in ids[0][1:] if i != ids[0][0])
    letters = Letters({"<|endoftext|>": 22, "<stop>": end})
    texts = [letters.decode(row) for row in ids]
    cut = [letters.decode(row[: row.index(end)] if end in row else row) for row in ids]
    prompts = ["ab", "<|endoftext|>"]

    assert cut != texts
    assert complete(model, letters, prompts, 15, temperature=0.0, end_of_text="<stop>") == cut
    assert complete(model, Letters({}), ["ab"], 15, temperature=0.0) == texts[:1]  # nothing ends early
    settings: dict[str, Any] = {"temperature": 1.3, "top_k": 9, "top_p": 0.8, "seed": 4}
    drawn = generate(model, [[0, 1], [22]], 15, end_id=22, **settings)
    assert complete(model, letters, prompts, 15, **settings) == [letters.decode(row) for row in drawn]


def test_ids_that_the_tokenizer_does_not_know_are_never_drawn(model):
    assert max(generate(model, [[0]], 40, seed=1)[0]) >= 5
    assert max(generate(model, [[0]], 40, seed=1, vocab_size=5)[0]) == 4
    (text,) = complete(model, Letters({}, vocab_size=5), ["a"], 40, seed=1)
    assert set(text) <= set("abcde")


def test_complete_names_a_prompt_that_encodes_to_nothing(model):
    with pytest.raises(InvalidInputError, match=r"prompt '\?!' encodes to no token.*<\|endoftext\|>"):
        complete(model, Letters({"<|endoftext|>": 22}), ["a", "?!"], 5)


def test_complete_does_not_take_a_text_for_a_list_of_letters(model):
    with pytest.raises(TypeError, match=r"prompts must be a list of strings.*\['abc'\]"):
        complete(model, Letters({}), "abc", 5)


def test_prompts_as_arrays_and_tensors(model):
    prompts = [[1, 2, 3], [4, 5, 6]]
    expected = generate(model, prompts, 4, seed=0)
    for same in (np.array(prompts), torch.tensor(prompts), [torch.tensor(prompts[0]), np.array(prompts[1])]):
        assert generate(model, same, 4, seed=0) == expected
    assert len(generate(model, torch.zeros((1, 1), dtype=torch.long), 5)[0]) == 5


@pytest.mark.parametrize(
    ("prompts", "error", "message"),
    [
        ([1, 2], TypeError, r"prompts must be a list of prompts, .* \[\[1, 2, 3\]\]; got list: \[1, 2\]"),
        (torch.tensor([1, 2]), TypeError, "prompts must be a list of prompts, .*; got Tensor"),
        (5, TypeError, "prompts must be a list of prompts, .*; got int: 5"),
        ("abc", TypeError, "prompts must be a list of prompts, .*; got str"),
        (["abc"], TypeError, "prompts must be a list of prompts, .*; got list"),
        ([[1], [1.0]], TypeError, r"prompts\[1\]\[0\] must be an integer, got float"),
        (torch.ones(1, 2), InvalidInputError, r"prompts\[0\] must be .* of integers, got torch.float32"),
        ([[1], [2, VOCAB]], WrongTokenizerError, f"prompt 1 has the id {VOCAB} at position 1, but .* 0 to {VOCAB - 1}"),
        ([[-1]], WrongTokenizerError, "prompt 0 has the id -1 at position 0"),
    ],
)
def test_wrong_prompts_are_named(monkeypatch, model, prompts, error, message):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # type checks would fail first
    with pytest.raises(error, match=message):
        generate(model, prompts, 2)


@pytest.mark.parametrize(
    ("end_id", "error", "message"),
    [
        ("x", TypeError, "end_id must be an integer, got str: 'x'"),
        (VOCAB, WrongTokenizerError, f"end_id must be one of the model's ids, 0 to {VOCAB - 1}, got {VOCAB}"),
    ],
)
def test_a_wrong_end_id_is_named(monkeypatch, model, end_id, error, message):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # type checks would fail first
    with pytest.raises(error, match=message):
        generate(model, [[1]], 2, end_id=end_id)


@pytest.mark.parametrize("sampling", [{"temperature": "1"}, {"top_p": "1"}, {"top_k": 1.5}, {"seed": "a"}])
def test_a_setting_of_the_wrong_type_is_named(monkeypatch, sampling):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # type checks would fail first
    with pytest.raises(TypeError, match=f"{next(iter(sampling))} must be a"):
        Sampling(**sampling)


# --- Models that have diverged --------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("use_cache", [True, False])
def test_logits_that_are_nan_are_an_error(model, temperature, use_cache):
    """The second sequence gets NaN once it reads token 7, inside its own prompt or after it."""
    broken = copy.deepcopy(model)
    broken.token_embeddings.weight.data[7] = math.nan
    with pytest.raises(FloatingPointError, match="logits after 3 tokens of sequence 1 are NaN"):
        generate(broken, [[1], [2, 7, 1]], 9, temperature=temperature, seed=0, vocab_size=6, use_cache=use_cache)
    assert len(generate(broken, [[1], [2, 3, 1]], 9, temperature=temperature, seed=0, vocab_size=6)[1]) == 9


def test_a_sequence_that_has_ended_may_be_nan(model):
    (new,) = generate(model, [[1]], 1, temperature=0)
    broken = copy.deepcopy(model)
    broken.token_embeddings.weight.data[new[0]] = math.nan
    assert generate(broken, [[1]], 1, temperature=0) == [new]
    assert generate(broken, [[1]], 5, temperature=0, end_id=new[0]) == [[]]
    with pytest.raises(FloatingPointError, match="logits after 2 tokens of sequence 0"):
        generate(broken, [[1]], 2, temperature=0)


def test_probabilities_of_nan_are_nan():
    logits = torch.tensor([[0.0, math.nan], [0.0, 1.0]])
    for temperature in (0.0, 1.0):
        assert next_token_probabilities(logits, temperature=temperature).isnan().tolist() == [[True] * 2, [False] * 2]


# --- Streams --------------------------------------------------------------------------------------------------


class Fragments:
    """A tokenizer whose ids are letters, fragments of characters of two to four bytes, and nothing."""

    letters = (b"a", b"b", b" ", b"\xc3", b"\xa9", b"\xe2\x82", b"\xac", b"\xf0\x9f", b"\x98", b"\x80", b"\xff", b"")
    longer = ("né".encode(), "€".encode(), "😀".encode(), b"\x98\x80c", b"\xa9\xf0", b"", b".", b"\n", b"\xe2", b"\x82")
    tokens = (*letters, *longer, b"<|endoftext|>")

    def __init__(self) -> None:
        self.vocab_size = VOCAB
        self.special_token_ids = {"<|endoftext|>": 22}

    def encode(self, text: str) -> list[int]:
        return [22] if text == "<|endoftext|>" else [self.tokens.index(letter.encode()) for letter in text]

    def decode_bytes(self, ids) -> bytes:
        return b"".join(self.tokens[i] for i in ids)

    def stream_decoder(self) -> StreamDecoder:
        return StreamDecoder(self.decode_bytes)

    def decode(self, ids) -> str:
        return self.decode_bytes(ids).decode(errors="replace")


def predict(monkeypatch, model, ids: list[int], prompt_length: int) -> None:
    """Make the model predict exactly these ids, one after the other."""

    def forward(token_ids, cache):
        logits = torch.full((*token_ids.shape, VOCAB), -1e9)
        logits[:, -1, ids[cache.length + token_ids.shape[1] - prompt_length]] = 0.0
        return logits

    monkeypatch.setattr(model, "forward", forward)


@pytest.mark.parametrize(("max_new_tokens", "seed"), [(0, 0), (1, 1), (7, 2), (30, 3), (30, 4), (30, 5)])
def test_a_stream_joined_is_the_completion(model, seed, max_new_tokens):
    settings: dict[str, Any] = {"temperature": 2.0, "top_k": 20, "top_p": 0.98, "seed": seed}
    chunks = list(stream(model, Fragments(), "ab", max_new_tokens, **settings))
    assert all(chunks)
    assert ["".join(chunks)] == complete(model, Fragments(), ["ab"], max_new_tokens, **settings)


@pytest.mark.parametrize(
    ("ids", "chunks"),
    [
        ([0, 1, 11, 2, 22, 0], ["a", "b", " "]),  # nothing for an empty token; up to the end of text
        ([0, 3, 4, 1, 22], ["a", "é", "b"]),
        ([5, 6, 7, 8, 9, 22], ["€", "😀"]),
        ([7, 15, 12, 16, 8, 2, 22], ["😀c", "né", "\ufffd", "\ufffd "]),  # a9 alone and f0 98 are no characters
        ([0, 10, 3, 0, 22], ["a", "\ufffd", "\ufffda"]),
        ([0, 7, 8, 22], ["a", "\ufffd"]),  # an incomplete character
        ([0, 5], ["a", "\ufffd"]),
    ],
)
def test_a_character_in_several_tokens_comes_with_the_last_of_them(model, monkeypatch, ids, chunks):
    predict(monkeypatch, model, ids, 1)
    assert list(stream(model, Fragments(), "a", len(ids), temperature=0.0)) == chunks


def test_a_stream_is_generated_lazily(model, monkeypatch):
    calls = []
    monkeypatch.setattr(model, "forward", lambda *args, old=model.forward: calls.append(1) or old(*args))
    chunks = stream(model, Fragments(), "ab", 100, temperature=3.0, seed=0, end_of_text="<none>")
    assert calls == []
    next(chunks)
    first = len(calls)
    next(chunks)
    assert 1 <= first < len(calls) < 20
    assert not torch.is_inference_mode_enabled()


def test_a_stream_raises_at_once(model):
    with pytest.raises(InvalidInputError, match="top_p must be above 0"):
        stream(model, Fragments(), "a", 5, top_p=0.0)
    with pytest.raises(InvalidInputError, match="max_new_tokens"):
        stream(model, Fragments(), "a", -1)
    with pytest.raises(InvalidInputError, match="the prompt '' encodes to no token"):
        stream(model, Fragments(), "", 5)
