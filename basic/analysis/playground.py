"""The data that the playground page shows: the tokens of a text, and a model's loss and predictions at each of them.

All answers are plain lists and numbers, for JSON; tokens are sent as their bytes in hexadecimal. The size of an answer
is bounded: it contains the first tokens of a long text, and statistics over all of them. `playground_server` serves
the page and these answers.
"""

from __future__ import annotations

import copy
import math
import os
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch

from basic.common.errors import InvalidInputError
from basic.generation.text import stream
from basic.model import TransformerLM
from basic.Tokenizer import Tokenizer
from basic.training.records.environment import check_run_tokenizer
from basic.training.run_folder import Run
from basic.transformer.functional import at_least_float32, softmax, token_losses

MAX_SHOWN_TOKENS = 3000
"""Tokens of a text that are sent to the page."""
MAX_SCORED_TOKENS = 1024
"""Tokens of a text that the model scores, if its context is longer."""
NUM_CANDIDATES = 10
"""Most probable tokens that are listed for each position."""
MAX_PATTERN_S = 5.0
"""Time in which a tokenizer's own pattern must split a text; some patterns need exponential time."""


def find_tokenizers(runs: str | os.PathLike) -> dict[str, Path]:
    """Find the saved tokenizers in a folder of runs: those of the runs, and tokenizer folders beside them, by name."""
    folder = Path(runs)
    tokenizers = {}
    for entry in sorted(folder.iterdir()) if folder.is_dir() else []:
        for candidate in (entry / "tokenizer", entry):
            if (candidate / "special_tokens.json").is_file():
                tokenizers[entry.name] = candidate
                break
    return tokenizers


def newest_run(runs: str | os.PathLike) -> Path | None:
    """Return the run with a tokenizer and the most recently written checkpoint; None without any."""
    modified = {
        path: path.stat().st_mtime
        for path in Path(runs).glob("*/checkpoints/step_*")
        if (path.parents[1] / "tokenizer").is_dir()
    }
    return max(modified, key=lambda path: modified[path]).parents[1] if modified else None


class Playground:
    """Answers the requests of the page; methods may be called from several threads.

    Args:
        runs: folder of runs, searched for tokenizers at every request that needs their list.
        run: the model to use; None: tokenizers only.
        name: the run's name on the page.
        gpt2: paths of GPT-2's vocabulary and merges, for comparison.
        others: more tokenizers for comparison, by their names on the page.

    Raises:
        InvalidInputError: the run has no tokenizer.
    """

    def __init__(
        self,
        runs: str | os.PathLike,
        run: Run | None = None,
        name: str = "run",
        *,
        gpt2: tuple[Path, Path] | None = None,
        others: Mapping[str, Tokenizer] | None = None,
    ) -> None:
        self._others = dict(others or {})
        self._runs, self._run, self._name, self._gpt2 = runs, run, name, gpt2
        self._loaded: dict[str, tuple[Any, Tokenizer]] = {}
        self._lock = threading.Lock()  # for _loaded; encoding needs no lock
        if run is not None:
            if run.tokenizer_path is None:
                raise InvalidInputError(f"the run {name} has no tokenizer/ folder; choose a run that has one")
            self._model_tokenizer = Tokenizer.load(run.tokenizer_path)
            check_run_tokenizer(run.tokenizer_path.parent, self._model_tokenizer.fingerprint)

    def about(self) -> dict[str, Any]:
        """Describe the available tokenizers and the model."""
        model = None
        if self._run is not None:
            model = {
                "name": self._name,
                "parameters": self._run.model.num_parameters,
                "context_length": self._run.config.model.context_length,
                "vocab_size": self._model_tokenizer.vocab_size,
                "step": self._run.step,
            }
        return {"tokenizers": list(self._tokenizer_sources()), "model": model}

    def tokenize(self, tokenizer_id: str, text: str) -> dict[str, Any]:
        """Tokenize a text; return its first tokens and statistics over all of them.

        Args:
            tokenizer_id: a name that `about` lists; it is never used as a path.

        Raises:
            KeyError: the name is unknown.
            OSError, DamagedFileError: the tokenizer's files are missing or damaged.
            InvalidInputError: the text cannot be encoded, or not within MAX_PATTERN_S.
        """
        with self._lock:
            tokenizer = self._load_tokenizer(tokenizer_id)
        ids = _with_deadline(tokenizer).encode_array(text)
        return {
            "tokens": len(ids),
            "distinct": len(np.unique(ids)),
            "bytes": len(tokenizer.decode_bytes(ids)),
            "vocab_size": tokenizer.vocab_size,
            **_describe_tokens(tokenizer, ids[:MAX_SHOWN_TOKENS].tolist()),
        }

    def evaluate(self, text: str, *, keep_end: bool = False) -> dict[str, Any]:
        """Compute the model's loss and its most probable tokens at each token of a text.

        The text follows an end-of-text token, as documents do in training, so that its first token has a loss too.

        Args:
            keep_end: evaluate the end of the text instead of its start, if it is longer than the context.

        Returns:
            `tokens`: number of tokens of the text. `first`: index of the first evaluated token. `nats`: loss of each
            evaluated token. `ranks`: 1 + the number of tokens with a higher probability. `likeliest`: ids and
            probabilities of the NUM_CANDIDATES most probable tokens at each position; if the context is not full, one
            more position follows, for the next token. A first token without context has None in all three lists.

        Raises:
            InvalidInputError: there is no model, or the text cannot be encoded.
        """
        run, tokenizer = self._require_model()
        ids = tokenizer.encode_array(text)
        max_inputs = min(run.config.model.context_length, MAX_SCORED_TOKENS)
        end_id = tokenizer.special_token_ids.get(run.config.train.end_of_text)
        prefix = [] if end_id is None else [end_id]
        max_tokens = max_inputs + 1 - len(prefix)  # the last token is a target, but not an input
        if keep_end and len(ids) > max_tokens:
            first, prefix = len(ids) - max_inputs - 1, []
            evaluated = ids[first:].tolist()
        else:
            first, evaluated = 0, ids[:max_tokens].tolist()
        sequence = [*prefix, *evaluated]
        without_context = [None] * (1 - len(prefix)) if evaluated else []
        nats, ranks, likeliest = _evaluate_sequence(run.model, sequence, max_inputs, tokenizer.vocab_size)
        candidate_ids = {token_id for position in likeliest for token_id, _ in position if token_id in tokenizer.vocab}
        num_bytes = len(tokenizer.decode_bytes(sequence[1:]))
        return {
            "tokens": len(ids),
            "first": first,
            **_describe_tokens(tokenizer, evaluated),
            "nats": without_context + [_round(x) for x in nats],
            "ranks": without_context + ranks,
            "likeliest": without_context + likeliest,
            "names": {token_id: tokenizer.vocab[token_id].hex() for token_id in candidate_ids},
            "mean_nats": sum(nats) / len(nats) if nats else None,
            "bits_per_byte": sum(nats) / math.log(2) / num_bytes if num_bytes else None,
        }

    def generate(self, prompt: str, max_new_tokens: int, **sampling: Any) -> Iterator[dict[str, Any]]:
        """Generate a continuation: first the length of the prompt, then text as it is generated.

        Args:
            prompt: empty for a new document; if it is longer than the context, its last tokens are used.
            max_new_tokens, sampling: as for `basic.generation.sampling.generate`.

        Yields:
            {"tokens": prompt tokens, "seen": prompt tokens that the model uses}, then {"text": new text} repeatedly.

        Raises:
            InvalidInputError: there is no model, or an argument is out of its range.
        """
        run, tokenizer = self._require_model()
        num_tokens = len(tokenizer.encode_array(prompt))
        yield {"tokens": num_tokens, "seen": min(num_tokens, run.config.model.context_length)}
        end_of_text = run.config.train.end_of_text
        texts = stream(
            run.model,
            tokenizer,
            run.with_document_start(prompt or end_of_text),
            max_new_tokens,
            end_of_text=end_of_text,
            **sampling,
        )
        for text in texts:
            yield {"text": text}

    def _require_model(self) -> tuple[Run, Tokenizer]:
        if self._run is None:
            raise InvalidInputError("there is no model; start the playground with a run: `basic playground runs/NAME`")
        return self._run, _with_deadline(self._model_tokenizer)

    def _tokenizer_sources(self) -> dict[str, Path | tuple[Path, Path]]:
        """Map the name of each tokenizer to its folder, or to its vocabulary and merges files."""
        sources: dict[str, Path | tuple[Path, Path]] = {}
        if self._run is not None and self._run.tokenizer_path is not None:
            sources[self._name] = self._run.tokenizer_path
        sources |= {name: path for name, path in find_tokenizers(self._runs).items() if name not in sources}
        if self._gpt2 is not None and all(path.is_file() for path in self._gpt2):
            sources["GPT-2"] = self._gpt2
        return sources | dict.fromkeys(self._others, Path())

    def _load_tokenizer(self, tokenizer_id: str) -> Tokenizer:
        if tokenizer_id in self._others:
            return self._others[tokenizer_id]
        source = self._tokenizer_sources()[tokenizer_id]
        files = source if isinstance(source, tuple) else (source / "special_tokens.json",)
        # A run that was trained again may have another tokenizer under the same name.
        version = (source, *(path.stat().st_mtime_ns for path in files))
        if self._loaded.get(tokenizer_id, (None,))[0] != version:
            if isinstance(source, tuple):
                tokenizer = Tokenizer.from_files(*source, special_tokens=["<|endoftext|>"])
            else:
                tokenizer = Tokenizer.load(source)
            self._loaded[tokenizer_id] = (version, tokenizer)
        return self._loaded[tokenizer_id][1]


class _PatternWithDeadline:
    """A pattern that finds pre-tokens until a time, and then raises InvalidInputError."""

    def __init__(self, pattern: Any, deadline_s: float) -> None:
        self.splits, self.name, self._find, self._deadline_s = pattern.splits, pattern.name, pattern.find, deadline_s

    def find(self, text: str) -> list[str]:
        try:
            return self._find(text, timeout=max(self._deadline_s - time.monotonic(), 1e-3))
        except TimeoutError:
            raise InvalidInputError(
                f"the tokenizer's pattern {self.splits[0][:80]!r} needs more than {MAX_PATTERN_S:g} s for this text; "
                "use a shorter text or another tokenizer"
            ) from None


def _with_deadline(tokenizer: Tokenizer) -> Tokenizer:
    """Return a tokenizer that works until MAX_PATTERN_S from now; GPT-2's pattern needs linear time and no deadline."""
    if tokenizer.pattern is None:
        return tokenizer
    limited = copy.copy(tokenizer)
    deadline_s = time.monotonic() + MAX_PATTERN_S
    limited.compiled_pattern = cast("Any", _PatternWithDeadline(tokenizer.compiled_pattern, deadline_s))
    return limited


@torch.inference_mode()
def _evaluate_sequence(
    model: TransformerLM, ids: list[int], max_inputs: int, vocab_size: int
) -> tuple[list[float], list[int], list[list[tuple[int, float]]]]:
    """Compute losses and ranks of all ids but the first, and the most probable next ids after each input.

    Args:
        ids: at most max_inputs + 1; the first max_inputs are inputs.
        vocab_size: ids below this are candidates; the model's vocabulary may be padded.
    """
    if not ids:
        return [], [], []
    device = model.token_embeddings.weight.device
    inputs, targets = (torch.tensor(x, dtype=torch.int64, device=device) for x in (ids[:max_inputs], ids[1:]))
    logits = model(inputs.unsqueeze(0))[0, :, :vocab_size]
    target_logits = logits[: len(targets)]
    ranks = 1 + (target_logits > target_logits.gather(-1, targets.unsqueeze(-1))).sum(-1)
    probabilities, top_ids = softmax(at_least_float32(logits), -1).topk(min(NUM_CANDIDATES, logits.shape[-1]))
    likeliest = [
        [(token_id, _round(p)) for token_id, p in zip(*candidates, strict=True)]
        for candidates in zip(top_ids.tolist(), probabilities.tolist(), strict=True)
    ]
    return token_losses(target_logits, targets).tolist(), ranks.tolist(), likeliest


def _describe_tokens(tokenizer: Tokenizer, ids: Sequence[int]) -> dict[str, Any]:
    """Return ids, their bytes in hexadecimal, and the indices of special tokens."""
    special_ids = set(tokenizer.special_token_ids.values())
    return {
        "ids": list(ids),
        "token_bytes": [tokenizer.vocab[token_id].hex() for token_id in ids],
        "special": [index for index, token_id in enumerate(ids) if token_id in special_ids],
    }


def _round(x: float) -> float:
    """Round to four significant digits, which keeps the JSON of long texts small."""
    return float(f"{x:.4g}")
