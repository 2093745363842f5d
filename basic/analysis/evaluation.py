"""How well a model predicts text it has not seen: mean loss over batches, of a whole file, of whole documents."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from einops import rearrange
from tqdm import tqdm

from basic.model import TransformerLM
from basic.tokens.index import Tokens
from basic.training.batches import check_token_ids
from basic.transformer.functional import token_nats


class FileScore(NamedTuple):
    """What a model needs for the tokens of a whole file."""

    nats: float
    """-log of the probability that the model gives to all scored tokens together."""
    num_tokens: int
    """Tokens scored."""

    @property
    def loss(self) -> float:
        """Nats a token."""
        return self.nats / self.num_tokens

    @property
    def perplexity(self) -> float:
        """exp(loss): among so many equally likely tokens one would be as uncertain."""
        return math.exp(self.loss) if self.loss < 700 else math.inf

    def bits_per_byte(self, num_bytes: int) -> float:
        """Bits for each byte of the text that the tokens stand for, which tokenizers cannot change.

        Args:
            num_bytes: length of that text in UTF-8, separators included, as a token file's sidecar counts them.
        """
        return self.nats / math.log(2) / num_bytes


@torch.inference_mode()
def score_tokens(
    model: TransformerLM,
    tokens: Tokens,
    *,
    first_id: int | None = None,
    stride: int | None = None,
    batch_size: int = 8,
    progress: bool = False,
) -> FileScore:
    """Score each token of a file once, with as much of what stands before it as a sliding window shows.

    Windows of the context's length begin `stride` tokens apart, and each scores the tokens that the one before did
    not reach; so each is predicted from at least `context_length - stride + 1` tokens, those at the beginning of the
    file from all there are. The last window ends where the file does.

    Args:
        tokens: integers (tokens,), a memory map of any size too.
        first_id: stands before the first token, such as end-of-text, behind which documents begin; with None the
            first token has nothing to be predicted from and is not scored.
        stride: 1 to context_length, by default half the context. Less scores better, as tokens are predicted from
            more, and takes longer; the context's length is fastest, and then most tokens lack half their context.
        batch_size: windows computed side by side; no part of the result.
        progress: show a bar.

    Returns:
        The sum, added up in float64, of losses in the model's precision.

    Raises:
        ValueError: nothing to score, an id outside the vocabulary, or a setting out of its range.
    """
    context = model.config.context_length
    stride = max(1, context // 2) if stride is None else stride
    if not 1 <= stride <= context:
        raise ValueError(f"stride must be from 1 to context_length={context}, got {stride}")
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    check_token_ids(tokens, model.config.vocab_size)
    before, last = 0 if first_id is None else -1, len(tokens) - 1  # the first id stands at position -1
    if last <= before:
        raise ValueError(f"there is nothing to score in {len(tokens)} tokens; give at least {before + 2}")
    width = min(context, last - before)
    begins = range(before + stride, last - width + 1, stride)
    rest = last - before - width - len(begins) * stride
    # Where windows begin, and how many of the last tokens they predict are new.
    groups: list[tuple[Sequence[int], int]] = [([before], width)]
    groups += [(begins[first : first + batch_size], stride) for first in range(0, len(begins), batch_size)]
    groups += [([last - width], rest)] if rest else []
    total = 0.0
    with tqdm(total=last - before, desc="scoring", unit=" tokens", unit_scale=True, disable=not progress) as bar:
        for group, num_new in groups:
            total += _window_nats(model, tokens, group, width, num_new, first_id)
            bar.update(len(group) * num_new)
    return FileScore(total, last - before)


def _window_nats(
    model: TransformerLM, tokens: Tokens, begins: Sequence[int], width: int, num_new: int, first_id: int | None
) -> float:
    """Nats of the last so many tokens that windows beginning at these positions predict."""
    positions = np.array(begins)[:, None] + np.arange(width + 1)
    ids = torch.from_numpy(tokens[positions.clip(min=0)].astype(np.int64))
    if first_id is not None and begins[0] < 0:
        ids[0, 0] = first_id
    ids = ids.to(model.token_embeddings.weight.device)
    # The output layer, most of a small model's work, is not for tokens that are context only.
    logits = model.lm_head(model.features(ids[:, :-1])[:, -num_new:])
    return token_nats(logits, ids[:, -num_new:]).cpu().double().sum().item()


@torch.inference_mode()
def document_nats(
    model: TransformerLM, documents: Sequence[Sequence[int]], separator_id: int, *, batch_size: int = 32
) -> np.ndarray:
    """-log of the probability that the model gives to each whole document, its end included, in nats.

    Each document stands alone: it follows one separator, and the separator that ends it is scored too. So the mean
    over documents drawn from a source can be compared with that source's entropy.

    Args:
        documents: ids without separators, each at most context_length - 1 of them.
        separator_id: the end-of-text id.
        batch_size: documents scored side by side; they are sorted by length, so that little is padded.

    Returns:
        float64 (documents,), in the order given.

    Raises:
        ValueError: a document does not fit into the context.
    """
    context = model.config.context_length
    longest = max(map(len, documents), default=0)
    if longest + 1 > context:
        raise ValueError(
            f"a document of {longest} tokens and its separator do not fit into context_length={context}; "
            "leave out documents of more than context_length - 1 tokens"
        )
    device = model.token_embeddings.weight.device
    nats = np.zeros(len(documents))
    by_length = sorted(range(len(documents)), key=lambda index: len(documents[index]))
    for first in range(0, len(documents), batch_size):
        chosen = by_length[first : first + batch_size]
        width = max(len(documents[index]) for index in chosen) + 2
        # Padding stands behind the end, where a causal model cannot see it from the tokens that count.
        rows = np.full((len(chosen), width), separator_id, dtype=np.int64)
        for row, index in enumerate(chosen):
            rows[row, 1 : 1 + len(documents[index])] = documents[index]
        lengths = np.array([len(documents[index]) + 1 for index in chosen])
        counts = np.arange(width - 1) < rearrange(lengths, "row -> row 1")
        tokens = torch.from_numpy(rows).to(device)
        losses = token_nats(model(tokens[:, :-1]), tokens[:, 1:]).cpu().double().numpy()
        nats[chosen] = (losses * counts).sum(1)
    return nats


def bigram_document_nats(
    tokens: np.ndarray, documents: Sequence[Sequence[int]], separator_id: int, vocab_size: int
) -> np.ndarray:
    """What `document_nats` would give for a bigram model: a yardstick that knows one token back and no further.

    Its probability of an id after another is (count of the pair + p(id)) / (count of pairs with that first + 1),
    where p is the smoothed share of the id alone; so nothing is impossible, and the probabilities sum to one.

    Args:
        tokens: ids (tokens,) to count, documents ending in the separator.
        documents: ids without separators.

    Returns:
        Nats of each document, its end included, float64 (documents,).
    """
    tokens = np.asarray(tokens, dtype=np.int64)
    single = np.bincount(tokens, minlength=vocab_size).astype(np.float64)
    share = (single + 1) / (single.sum() + vocab_size)
    firsts = np.bincount(tokens[:-1], minlength=vocab_size)
    # A pair is one number; only the pairs that occur are kept, in order, so that bisection finds them.
    pairs, counts = np.unique(tokens[:-1] * vocab_size + tokens[1:], return_counts=True)
    nats = np.zeros(len(documents))
    for index, document in enumerate(documents):
        row = np.array([separator_id, *document, separator_id])
        asked = row[:-1] * vocab_size + row[1:]
        place = np.searchsorted(pairs, asked).clip(max=len(pairs) - 1)
        seen = np.where(pairs[place] == asked, counts[place], 0)
        nats[index] = -np.log((seen + share[row[1:]]) / (firsts[row[:-1]] + 1)).sum()
    return nats


class SourceComparison(NamedTuple):
    """What documents hold, and what models need for them: means over those that fit into the context, in nats each."""

    num_documents: int
    num_fitting: int
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


def compare_with_source(
    model: TransformerLM,
    documents: Sequence[Sequence[int]],
    exact_nats: Sequence[float],
    train_tokens: np.ndarray,
    separator_id: int,
) -> SourceComparison:
    """Compare a model, and a bigram model, with the exact information of documents from a known source.

    Args:
        documents: ids without separators; those that do not fit into the context are left out.
        exact_nats: -log of each document's true probability.
        train_tokens: what the bigrams are counted in.
    """
    fits = [len(document) < model.config.context_length for document in documents]
    kept = [document for document, fit in zip(documents, fits, strict=True) if fit]
    exact = [nats for nats, fit in zip(exact_nats, fits, strict=True) if fit]
    ours = document_nats(model, kept, separator_id)
    bigram = bigram_document_nats(train_tokens, kept, separator_id, model.config.vocab_size)
    means = (float(np.mean(nats)) if kept else math.nan for nats in (exact, ours, bigram))
    return SourceComparison(len(documents), len(kept), *means)
