"""Evaluation against plain loops over single documents, tokens, pairs and batches."""

import itertools
import math
from collections import Counter

import numpy as np
import pytest
import torch

from basic.analysis.evaluation import (
    EvaluationResult,
    bigram_document_nats,
    compare_with_entropy,
    document_nats,
    evaluate_tokens,
)
from basic.common.errors import InvalidInputError, WrongTokenizerError
from basic.model import TransformerLM
from basic.training.batches import BatchSampler
from basic.training.step import mean_loss
from tests.helpers.model_tools import decided_model

VOCAB, CONTEXT, END = 19, 16, 7
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def model() -> TransformerLM:
    return decided_model(2, vocab_size=VOCAB, context_length=CONTEXT)


@pytest.fixture(scope="module")
def documents() -> list[list[int]]:
    """Documents of every length that fits, 0 included, in random order."""
    generator = np.random.default_rng(1)
    lengths = generator.permutation([*range(CONTEXT), *range(CONTEXT)])
    return [generator.choice([i for i in range(VOCAB) if i != END], size=length).tolist() for length in lengths]


@torch.no_grad()
def reference_document_nats(model: TransformerLM, document: list[int]) -> float:
    log_probabilities = torch.log_softmax(model(torch.tensor([[END, *document]]))[0].double(), -1)
    return -sum(log_probabilities[position, token].item() for position, token in enumerate([*document, END]))


@pytest.mark.parametrize("batch_size", [1, 5, 32, 1000])
def test_document_nats_match_documents_scored_one_at_a_time(model, documents, batch_size):
    expected = [reference_document_nats(model, document) for document in documents]
    actual = document_nats(model, documents, END, batch_size=batch_size)
    assert actual.dtype == np.float64
    np.testing.assert_allclose(actual, expected, rtol=1e-5)


def test_document_nats_of_no_documents(model):
    assert document_nats(model, [], END).shape == (0,)


def test_document_longer_than_context_is_an_error(model):
    with pytest.raises(InvalidInputError, match=r"a document of 16 tokens .* context_length=16"):
        document_nats(model, [[1], [2] * CONTEXT], END)


def test_mean_loss_averages_the_first_batches_and_is_deterministic(model):
    tokens = np.random.default_rng(0).integers(VOCAB, size=300).astype(np.uint16)
    sampler = BatchSampler(tokens, 4, CONTEXT, seed=3)
    losses = []
    for step in range(3):
        inputs, targets = sampler.batch(step)
        with torch.no_grad():
            logits = model(inputs)
        losses += [
            -torch.log_softmax(logits[row, position], -1)[targets[row, position]].item()
            for row in range(4)
            for position in range(CONTEXT)
        ]
    first = mean_loss(model.loss, sampler, 3, CPU)
    assert first == pytest.approx(sum(losses) / len(losses), rel=1e-5)
    assert mean_loss(model.loss, sampler, 3, CPU) == first
    assert mean_loss(model.loss, sampler, 1, CPU) == pytest.approx(sum(losses[:64]) / 64, rel=1e-5)


# --- Token files ----------------------------------------------------------------------------------------------


@torch.no_grad()
def reference_nats(model: TransformerLM, ids: list[int], stride: int) -> float:
    """Score each token with the context that the first window containing it provides."""
    last, total = len(ids) - 1, 0.0
    for position in range(1, len(ids)):
        start = 0
        while start + CONTEXT < position:
            start += stride
        start = max(min(start, last - CONTEXT), 0)  # the last window ends at the end of the file
        logits = model(torch.tensor([ids[start:position]]))[0, -1].double()
        total -= torch.log_softmax(logits, -1)[ids[position]].item()
    return total


@pytest.mark.parametrize("stride", [1, 5, 8, CONTEXT])
@pytest.mark.parametrize("length", [2, 16, 17, 18, 25, 67])
@pytest.mark.parametrize("prefix_token_id", [None, END])
def test_sliding_windows_match_scoring_token_by_token(model, length, stride, prefix_token_id):
    tokens = np.random.default_rng(length).integers(VOCAB, size=length).astype(np.uint16)
    result = evaluate_tokens(model, tokens, prefix_token_id=prefix_token_id, stride=stride, batch_size=3)
    ids = tokens.tolist() if prefix_token_id is None else [prefix_token_id, *tokens.tolist()]
    assert result.num_tokens == len(ids) - 1
    assert result.nats == pytest.approx(reference_nats(model, ids, stride), rel=1e-6)


def test_stride_1_scores_every_token_with_full_context(model):
    tokens = np.random.default_rng(3).integers(VOCAB, size=60)
    ids, total = [END, *tokens.tolist()], 0.0
    for position in range(1, len(ids)):
        logits = model(torch.tensor([ids[max(0, position - CONTEXT) : position]]))[0, -1].double()
        total -= torch.log_softmax(logits, -1)[ids[position]].item()
    assert evaluate_tokens(model, tokens, prefix_token_id=END, stride=1).nats == pytest.approx(total, rel=1e-6)


@pytest.mark.parametrize("batch_size", [1, 2, 7, 1000])
def test_result_does_not_depend_on_batch_size(model, batch_size):
    tokens = np.random.default_rng(0).integers(VOCAB, size=300).astype(np.uint16)
    expected = evaluate_tokens(model, tokens, prefix_token_id=END, batch_size=8)
    assert evaluate_tokens(model, tokens, prefix_token_id=END, batch_size=batch_size).nats == pytest.approx(
        expected.nats, rel=1e-6
    )


@pytest.mark.parametrize("logits_at_once", [1, 3 * VOCAB, 7 * VOCAB + 1])
def test_result_does_not_depend_on_the_size_of_the_pieces(model, logits_at_once, monkeypatch):
    ids = np.random.default_rng(4).integers(VOCAB, size=50)
    expected = evaluate_tokens(model, ids)
    monkeypatch.setattr("basic.analysis.evaluation._LOGITS_AT_ONCE", logits_at_once)
    assert evaluate_tokens(model, ids).nats == pytest.approx(expected.nats, rel=1e-6)


def test_default_stride_is_half_the_context(model):
    tokens = np.random.default_rng(0).integers(VOCAB, size=100)
    assert evaluate_tokens(model, tokens) == evaluate_tokens(model, tokens, stride=CONTEXT // 2)
    assert evaluate_tokens(model, tokens) != evaluate_tokens(model, tokens, stride=CONTEXT)


def test_uniform_model_has_loss_log_vocab_size(model):
    uniform = TransformerLM(model.config)
    uniform.lm_head.weight.data.zero_()
    result = evaluate_tokens(uniform, np.arange(40) % VOCAB, prefix_token_id=END)
    assert (result.num_tokens, result.loss) == (40, pytest.approx(math.log(VOCAB)))
    assert result.perplexity == pytest.approx(VOCAB)
    assert result.bits_per_byte(80) == pytest.approx(math.log2(VOCAB) / 2)
    assert EvaluationResult(1e6, 10).perplexity == math.inf


@pytest.mark.parametrize(
    ("tokens", "settings", "message"),
    [
        ([], {"prefix_token_id": END}, "nothing to score in 0 tokens; give at least 1"),
        ([3], {}, "nothing to score in 1 tokens; give at least 2"),
        ([3, 4], {"stride": 0}, "stride must be from 1 to context_length=16, got 0"),
        ([3, 4], {"stride": 17}, "stride must be from 1 to context_length=16, got 17"),
        ([3, 4], {"batch_size": 0}, "batch_size must be at least 1, got 0"),
    ],
)
def test_invalid_input_is_an_error(model, tokens, settings, message):
    with pytest.raises(InvalidInputError, match=message):
        evaluate_tokens(model, np.array(tokens, np.uint16), **settings)


def test_token_id_outside_the_vocabulary_is_an_error(model):
    with pytest.raises(WrongTokenizerError, match="token id 19 at position 2 is not in the vocabulary of 19 ids"):
        evaluate_tokens(model, np.array([3, 4, VOCAB], np.uint16))


# --- Bigram model ---------------------------------------------------------------------------------------------


def bigram_probability(tokens: list[int], first: int, second: int) -> float:
    pairs = Counter(itertools.pairwise(tokens))
    first_counts = Counter(tokens[:-1])
    unigram = (tokens.count(second) + 1) / (len(tokens) + VOCAB)
    return (pairs[first, second] + unigram) / (first_counts[first] + 1)


@pytest.fixture(scope="module")
def tokens() -> list[int]:
    generator = np.random.default_rng(4)
    return [*generator.choice(6, size=100).tolist(), END, *generator.choice(9, size=100).tolist(), END]


def test_bigram_document_nats_match_counts_in_dictionaries(tokens, documents):
    expected = [
        -sum(
            math.log(bigram_probability(tokens, first, second))
            for first, second in zip([END, *document], [*document, END], strict=True)
        )
        for document in documents
    ]
    actual = bigram_document_nats(np.array(tokens, np.uint16), documents, END, VOCAB)
    np.testing.assert_allclose(actual, expected, rtol=1e-12)


def test_reference_bigram_probabilities_sum_to_one(tokens):
    for first in range(VOCAB):  # includes ids that never occur and the last token, which starts no pair
        assert sum(bigram_probability(tokens, first, second) for second in range(VOCAB)) == pytest.approx(1, abs=1e-12)


def test_entropy_comparison_averages_over_documents_that_fit(model, documents, tokens):
    exact = [float(number) for number in range(1, len(documents) + 1)]
    too_long = [0] * model.config.context_length
    means = compare_with_entropy(model, [*documents, too_long], [*exact, 1e6], np.array(tokens), END)
    assert (means.num_documents, means.num_fitting) == (len(documents) + 1, len(documents))
    assert means.exact == pytest.approx(np.mean(exact))
    assert means.model == pytest.approx(
        np.mean([reference_document_nats(model, document) for document in documents]), rel=1e-5
    )
    bigram = bigram_document_nats(np.array(tokens), documents, END, model.config.vocab_size)
    assert means.bigram == pytest.approx(bigram.mean())
    assert f"{len(documents)} of {len(documents) + 1} unseen documents" in str(means)


def test_entropy_comparison_reports_when_no_document_fits(model, tokens):
    too_long = [0] * model.config.context_length
    means = compare_with_entropy(model, [too_long], [1.0], np.array(tokens), END)
    assert means.num_fitting == 0
    assert "no document fits into the context" in str(means)
