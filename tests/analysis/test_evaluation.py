"""Evaluation against one document, one pair, one batch at a time."""

import itertools
import math
from collections import Counter

import numpy as np
import pytest
import torch

from basic.analysis.evaluation import FileScore, bigram_document_nats, compare_with_source, document_nats, score_tokens
from basic.model import ModelConfig, TransformerLM
from basic.training.batches import BatchSampler
from basic.training.step import mean_loss

VOCAB, CONTEXT, END = 19, 16, 7
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def model() -> TransformerLM:
    torch.manual_seed(2)
    model = TransformerLM(
        ModelConfig(vocab_size=VOCAB, context_length=CONTEXT, d_model=16, num_layers=2, num_heads=2)
    ).eval()
    torch.nn.init.normal_(model.lm_head.weight, std=1.0)
    return model


@pytest.fixture(scope="module")
def documents() -> list[list[int]]:
    """Documents of every length that fits, the empty one too, in no order."""
    generator = np.random.default_rng(1)
    lengths = generator.permutation([*range(CONTEXT), *range(CONTEXT)])
    return [generator.choice([i for i in range(VOCAB) if i != END], size=length).tolist() for length in lengths]


@torch.no_grad()
def nats_by_hand(model: TransformerLM, document: list[int]) -> float:
    log_probabilities = torch.log_softmax(model(torch.tensor([[END, *document]]))[0].double(), -1)
    return -sum(log_probabilities[place, token].item() for place, token in enumerate([*document, END]))


@pytest.mark.parametrize("batch_size", [1, 5, 32, 1000])
def test_document_nats_are_those_of_each_document_alone_in_the_order_given(model, documents, batch_size):
    expected = [nats_by_hand(model, document) for document in documents]
    actual = document_nats(model, documents, END, batch_size=batch_size)
    assert actual.dtype == np.float64
    np.testing.assert_allclose(actual, expected, rtol=1e-5)


def test_document_nats_of_no_documents(model):
    assert document_nats(model, [], END).shape == (0,)


def test_a_document_that_does_not_fit_is_an_error_that_says_what_would(model):
    with pytest.raises(ValueError, match=r"a document of 16 tokens .* context_length=16"):
        document_nats(model, [[1], [2] * CONTEXT], END)


def test_mean_loss_is_the_mean_over_the_first_batches_every_time(model):
    tokens = np.random.default_rng(0).integers(VOCAB, size=300).astype(np.uint16)
    sampler = BatchSampler(tokens, 4, CONTEXT, seed=3)
    losses = []
    for step in range(3):
        inputs, targets = sampler.batch(step)
        with torch.no_grad():
            logits = model(inputs)
        losses += [
            -torch.log_softmax(logits[row, place], -1)[targets[row, place]].item()
            for row in range(4)
            for place in range(CONTEXT)
        ]
    first = mean_loss(model.loss, sampler, 3, CPU)
    assert first == pytest.approx(sum(losses) / len(losses), rel=1e-5)
    assert mean_loss(model.loss, sampler, 3, CPU) == first
    assert mean_loss(model.loss, sampler, 1, CPU) == pytest.approx(sum(losses[:64]) / 64, rel=1e-5)


# --- Whole files ----------------------------------------------------------------------------------------------


@torch.no_grad()
def score_by_hand(model: TransformerLM, ids: list[int], stride: int) -> float:
    """One token after the other, each from what the first window that reaches it shows."""
    last, total = len(ids) - 1, 0.0
    for position in range(1, len(ids)):
        begin = 0
        while begin + CONTEXT < position:
            begin += stride
        begin = max(min(begin, last - CONTEXT), 0)  # the last window ends with the file
        logits = model(torch.tensor([ids[begin:position]]))[0, -1].double()
        total -= torch.log_softmax(logits, -1)[ids[position]].item()
    return total


@pytest.mark.parametrize("stride", [1, 5, 8, CONTEXT])
@pytest.mark.parametrize("length", [2, 16, 17, 18, 25, 67])
@pytest.mark.parametrize("first_id", [None, END])
def test_a_file_scored_in_windows_is_one_scored_token_by_token(model, length, stride, first_id):
    tokens = np.random.default_rng(length).integers(VOCAB, size=length).astype(np.uint16)
    score = score_tokens(model, tokens, first_id=first_id, stride=stride, batch_size=3)
    ids = tokens.tolist() if first_id is None else [first_id, *tokens.tolist()]
    assert score.num_tokens == len(ids) - 1
    assert score.nats == pytest.approx(score_by_hand(model, ids, stride), rel=1e-6)


def test_each_token_from_its_full_context_is_what_a_stride_of_one_gives(model):
    tokens = np.random.default_rng(3).integers(VOCAB, size=60)
    ids, total = [END, *tokens.tolist()], 0.0
    for position in range(1, len(ids)):
        logits = model(torch.tensor([ids[max(0, position - CONTEXT) : position]]))[0, -1].double()
        total -= torch.log_softmax(logits, -1)[ids[position]].item()
    assert score_tokens(model, tokens, first_id=END, stride=1).nats == pytest.approx(total, rel=1e-6)


@pytest.mark.parametrize("batch_size", [1, 2, 7, 1000])
def test_the_score_does_not_depend_on_the_batch_size(model, batch_size):
    tokens = np.random.default_rng(0).integers(VOCAB, size=300).astype(np.uint16)
    expected = score_tokens(model, tokens, first_id=END, batch_size=8)
    assert score_tokens(model, tokens, first_id=END, batch_size=batch_size).nats == pytest.approx(
        expected.nats, rel=1e-6
    )


def test_the_default_stride_is_half_the_context(model):
    tokens = np.random.default_rng(0).integers(VOCAB, size=100)
    assert score_tokens(model, tokens) == score_tokens(model, tokens, stride=CONTEXT // 2)
    assert score_tokens(model, tokens) != score_tokens(model, tokens, stride=CONTEXT)


def test_a_model_that_knows_nothing_needs_the_logarithm_of_its_vocabulary(model):
    ignorant = TransformerLM(model.config)
    ignorant.lm_head.weight.data.zero_()
    score = score_tokens(ignorant, np.arange(40) % VOCAB, first_id=END)
    assert (score.num_tokens, score.loss) == (40, pytest.approx(math.log(VOCAB)))
    assert score.perplexity == pytest.approx(VOCAB)
    assert score.bits_per_byte(80) == pytest.approx(math.log2(VOCAB) / 2)
    assert FileScore(1e6, 10).perplexity == math.inf


@pytest.mark.parametrize(
    ("tokens", "settings", "message"),
    [
        ([], {"first_id": END}, "nothing to score in 0 tokens; give at least 1"),
        ([3], {}, "nothing to score in 1 tokens; give at least 2"),
        ([3, 4], {"stride": 0}, "stride must be from 1 to context_length=16, got 0"),
        ([3, 4], {"stride": 17}, "stride must be from 1 to context_length=16, got 17"),
        ([3, 4], {"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ([3, 4, VOCAB], {}, "token id 19 at position 2 is not in the vocabulary of 19 ids"),
    ],
)
def test_what_cannot_be_scored_is_named(model, tokens, settings, message):
    with pytest.raises(ValueError, match=message):
        score_tokens(model, np.array(tokens, np.uint16), **settings)


# --- The bigram model -----------------------------------------------------------------------------------------


def bigram_probability(tokens: list[int], first: int, second: int) -> float:
    pairs = Counter(itertools.pairwise(tokens))
    firsts = Counter(tokens[:-1])
    share = (tokens.count(second) + 1) / (len(tokens) + VOCAB)
    return (pairs[first, second] + share) / (firsts[first] + 1)


@pytest.fixture(scope="module")
def tokens() -> list[int]:
    generator = np.random.default_rng(4)
    return [*generator.choice(6, size=100).tolist(), END, *generator.choice(9, size=100).tolist(), END]


def test_bigram_against_counts_in_dictionaries(tokens, documents):
    expected = [
        -sum(
            math.log(bigram_probability(tokens, first, second))
            for first, second in zip([END, *document], [*document, END], strict=True)
        )
        for document in documents
    ]
    actual = bigram_document_nats(np.array(tokens, np.uint16), documents, END, VOCAB)
    np.testing.assert_allclose(actual, expected, rtol=1e-12)


def test_the_bigram_probabilities_in_that_comparison_sum_to_one(tokens):
    for first in range(VOCAB):  # the last of the tokens, which begins no pair, and ids that never occur, are among them
        assert sum(bigram_probability(tokens, first, second) for second in range(VOCAB)) == pytest.approx(1, abs=1e-12)


def test_comparison_with_the_source_is_over_the_documents_that_fit(model, documents, tokens):
    exact = [float(number) for number in range(1, len(documents) + 1)]
    too_long = [0] * model.config.context_length
    means = compare_with_source(model, [*documents, too_long], [*exact, 1e6], np.array(tokens), END)
    assert (means.num_documents, means.num_fitting) == (len(documents) + 1, len(documents))
    assert means.exact == pytest.approx(np.mean(exact))
    assert means.model == pytest.approx(np.mean([nats_by_hand(model, document) for document in documents]), rel=1e-5)
    bigram = bigram_document_nats(np.array(tokens), documents, END, model.config.vocab_size)
    assert means.bigram == pytest.approx(bigram.mean())
    assert f"{len(documents)} of {len(documents) + 1} unseen documents" in str(means)


def test_comparison_with_the_source_says_so_when_nothing_fits(model, tokens):
    too_long = [0] * model.config.context_length
    means = compare_with_source(model, [too_long], [1.0], np.array(tokens), END)
    assert means.num_fitting == 0
    assert "no document fits into the context" in str(means)
