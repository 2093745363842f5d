"""Cross-entropy of a model on token files and on documents, in nats; perplexity and bits per byte follow from it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from einops import rearrange
from tqdm import tqdm

from basic.common.arguments import check_integer, check_size, id_array
from basic.common.errors import InvalidInputError
from basic.model import TransformerLM
from basic.tokens.index import Tokens
from basic.training.batches import check_token_ids
from basic.transformer.functional import token_losses

_LOGITS_AT_ONCE = 1 << 23
"""Memory of more is new from the system each time, which takes longer than the logits."""


class EvaluationResult(NamedTuple):
    """The cross-entropy of a model on a sequence of tokens."""

    nats: float
    """Sum over the tokens of -log p(token | the tokens before it)."""
    num_tokens: int
    """Number of tokens in the sum."""

    @property
    def loss(self) -> float:
        """Mean cross-entropy in nats per token."""
        return self.nats / self.num_tokens

    @property
    def perplexity(self) -> float:
        """exp(loss); infinite where exp overflows."""
        return math.exp(self.loss) if self.loss < 700 else math.inf

    def bits_per_byte(self, num_bytes: int) -> float:
        """Cross-entropy in bits per byte of text, which is comparable between tokenizers.

        Args:
            num_bytes: length of the text in UTF-8, separators included, as in a token file's sidecar.
        """
        return self.nats / math.log(2) / num_bytes


@torch.inference_mode()
def evaluate_tokens(
    model: TransformerLM,
    tokens: Tokens | torch.Tensor | Sequence[int],
    *,
    prefix_token_id: int | None = None,
    stride: int | None = None,
    batch_size: int = 8,
    progress: bool = False,
) -> EvaluationResult:
    """Compute the cross-entropy of every token of a file with a sliding window.

    Windows of `context_length` tokens start `stride` tokens apart. Each window scores the tokens that the previous
    window did not reach, so every token is scored once, with at least `context_length - stride + 1` tokens of
    context, or all tokens before it near the start of the file. The last window ends at the end of the file.

    Args:
        tokens: integers (tokens,); may be a memory map of any size.
        prefix_token_id: id put before the first token, usually end-of-text, which documents follow in training. With
            None the first token has no context and is not scored.
        stride: 1 to context_length, by default context_length // 2. A smaller stride gives more context, hence a
            lower loss, and takes longer.
        batch_size: windows per forward pass; does not change the result.

    Returns:
        Losses in the model's precision, summed in float64.

    Raises:
        InvalidInputError: there are no tokens to score, or an argument is out of its range.
        WrongTokenizerError: a token id is outside the model's vocabulary.
    """
    context = model.config.context_length
    stride = max(1, context // 2) if stride is None else check_integer("stride", stride)
    if not 1 <= stride <= context:
        raise InvalidInputError(f"stride must be from 1 to context_length={context}, got {stride}")
    batch_size = check_size("batch_size", batch_size)
    tokens = id_array("tokens", tokens)
    check_token_ids(tokens, model.config.vocab_size)
    first, last = 0 if prefix_token_id is None else -1, len(tokens) - 1  # the prefix has position -1
    if last <= first:
        raise InvalidInputError(f"there is nothing to score in {len(tokens)} tokens; give at least {first + 2}")
    width = min(context, last - first)
    starts = range(first + stride, last - width + 1, stride)
    num_rest = last - first - width - len(starts) * stride
    # Pairs of window starts and the number of tokens at the end of each window that are scored.
    groups: list[tuple[Sequence[int], int]] = [([first], width)]
    groups += [(starts[index : index + batch_size], stride) for index in range(0, len(starts), batch_size)]
    groups += [([last - width], num_rest)] if num_rest else []
    nats = 0.0
    with tqdm(total=last - first, desc="scoring", unit=" tokens", unit_scale=True, disable=not progress) as bar:
        for group, num_scored in groups:
            nats += _window_nats(model, tokens, group, width, num_scored, prefix_token_id)
            bar.update(len(group) * num_scored)
    return EvaluationResult(nats, last - first)


def _window_nats(
    model: TransformerLM,
    tokens: Tokens,
    starts: Sequence[int],
    width: int,
    num_scored: int,
    prefix_token_id: int | None,
) -> float:
    """Sum the losses of the last `num_scored` targets of each window."""
    positions = np.array(starts)[:, None] + np.arange(width + 1)
    ids = torch.from_numpy(tokens[positions.clip(min=0)].astype(np.int64))
    if prefix_token_id is not None and starts[0] < 0:
        ids[0, 0] = prefix_token_id
    ids = ids.to(model.token_embeddings.weight.device)
    # The output layer is most of a small model's work, so positions that are only context skip it.
    features = model.features(ids[:, :-1])[:, -num_scored:].flatten(0, 1)
    num_rows = max(1, _LOGITS_AT_ONCE // model.config.vocab_size)
    pieces = zip(features.split(num_rows), ids[:, -num_scored:].flatten().split(num_rows), strict=True)
    return sum(token_losses(model.lm_head(x), targets).cpu().double().sum().item() for x, targets in pieces)


@torch.inference_mode()
def document_nats(
    model: TransformerLM, documents: Sequence[Sequence[int]], separator_id: int, *, batch_size: int = 32
) -> np.ndarray:
    """Compute the negative log-likelihood of each document in nats.

    Each document is scored independently: it follows one separator, and the separator that ends it is scored too.
    The mean over documents drawn from a source is thus comparable with the entropy of that source.

    Args:
        documents: ids without separators, at most context_length - 1 per document.
        batch_size: documents per forward pass; they are sorted by length to reduce padding.

    Returns:
        float64 (documents,), in the order of `documents`.

    Raises:
        InvalidInputError: a document does not fit in the context.
    """
    context = model.config.context_length
    longest = max(map(len, documents), default=0)
    if longest + 1 > context:
        raise InvalidInputError(
            f"a document of {longest} tokens and its separator do not fit into context_length={context}; "
            "leave out documents of more than context_length - 1 tokens"
        )
    device = model.token_embeddings.weight.device
    nats = np.zeros(len(documents))
    by_length = sorted(range(len(documents)), key=lambda index: len(documents[index]))
    for start in range(0, len(documents), batch_size):
        batch = by_length[start : start + batch_size]
        width = max(len(documents[index]) for index in batch) + 2
        # Padding follows the last separator. Attention is causal, so padding does not affect the scored tokens.
        ids = np.full((len(batch), width), separator_id, dtype=np.int64)
        for row, index in enumerate(batch):
            ids[row, 1 : 1 + len(documents[index])] = documents[index]
        num_targets = np.array([len(documents[index]) + 1 for index in batch])
        is_target = np.arange(width - 1) < rearrange(num_targets, "batch -> batch 1")
        tokens = torch.from_numpy(ids).to(device)
        losses = token_losses(model(tokens[:, :-1]), tokens[:, 1:]).cpu().double().numpy()
        nats[batch] = (losses * is_target).sum(1)
    return nats


def bigram_document_nats(
    tokens: np.ndarray, documents: Sequence[Sequence[int]], separator_id: int, vocab_size: int
) -> np.ndarray:
    """Compute the negative log-likelihood of each document under a smoothed bigram model, as a baseline.

    p(b | a) = (count(a b) + p(b)) / (count(a) + 1), where count(a) counts pairs that start with a, and p(b) is the
    add-one estimate of b's frequency. Every probability is positive, and they sum to one over b.

    Args:
        tokens: training ids (tokens,), with a separator at the end of each document.

    Returns:
        float64 (documents,), comparable with `document_nats`.
    """
    tokens = np.asarray(tokens, dtype=np.int64)
    unigram_counts = np.bincount(tokens, minlength=vocab_size).astype(np.float64)
    unigram = (unigram_counts + 1) / (unigram_counts.sum() + vocab_size)
    first_counts = np.bincount(tokens[:-1], minlength=vocab_size)
    # A pair is encoded as one number. The sorted array of pairs that occur is searched by bisection.
    pairs, counts = np.unique(tokens[:-1] * vocab_size + tokens[1:], return_counts=True)
    nats = np.zeros(len(documents))
    for index, document in enumerate(documents):
        ids = np.array([separator_id, *document, separator_id])
        queries = ids[:-1] * vocab_size + ids[1:]
        slots = np.searchsorted(pairs, queries).clip(max=len(pairs) - 1)
        pair_counts = np.where(pairs[slots] == queries, counts[slots], 0)
        nats[index] = -np.log((pair_counts + unigram[ids[1:]]) / (first_counts[ids[:-1]] + 1)).sum()
    return nats


class EntropyComparison(NamedTuple):
    """Mean negative log-likelihood per document, in nats, under the true source, a model and a bigram model."""

    num_documents: int
    num_fitting: int
    """Documents that fit in the context; the means are over these."""
    exact: float
    model: float
    bigram: float

    def __str__(self) -> str:
        if self.num_fitting == 0:
            return "no document fits into the context, so none can be scored; a larger vocabulary makes them shorter"
        of_all = f" of {self.num_documents:,}" if self.num_fitting < self.num_documents else ""
        return (
            f"{self.num_fitting:,}{of_all} unseen documents, each from its start to its end, in nats a document:\n"
            f"  exact information {self.exact:7.2f}\n"
            f"  this model        {self.model:7.2f}  ({self.model / self.exact - 1:+.1%})\n"
            f"  a bigram model    {self.bigram:7.2f}  ({self.bigram / self.exact - 1:+.1%})"
        )


def compare_with_entropy(
    model: TransformerLM,
    documents: Sequence[Sequence[int]],
    exact_nats: Sequence[float],
    train_tokens: np.ndarray,
    separator_id: int,
) -> EntropyComparison:
    """Compare a model and a bigram model with the exact likelihood of documents from a known source.

    Args:
        documents: ids without separators; those that do not fit in the context are skipped.
        exact_nats: -log of each document's probability under the source.
        train_tokens: ids (tokens,) that the bigram model is estimated from.
    """
    is_fitting = [len(document) < model.config.context_length for document in documents]
    fitting = [document for document, fits in zip(documents, is_fitting, strict=True) if fits]
    exact = [nats for nats, fits in zip(exact_nats, is_fitting, strict=True) if fits]
    model_nats = document_nats(model, fitting, separator_id)
    bigram_nats = bigram_document_nats(train_tokens, fitting, separator_id, model.config.vocab_size)
    means = (float(np.mean(nats)) if fitting else math.nan for nats in (exact, model_nats, bigram_nats))
    return EntropyComparison(len(documents), len(fitting), *means)
