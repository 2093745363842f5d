"""What the playground page shows: a text as the tokens of any tokenizer, and as a model sees it, token by token.

Everything goes out as plain lists and numbers that JSON can hold, tokens as their bytes in hexadecimal; how it gets to
the page is the business of `basic.analysis.playground_server`. What is sent is bounded, however long the text: the
first tokens of it, and the totals of all of it.
"""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from basic.generation.text import stream
from basic.model import TransformerLM
from basic.Tokenizer import Tokenizer
from basic.training.run_folder import Run
from basic.transformer.functional import at_least_float32, softmax, token_nats

SHOWN_TOKENS = 3000
"""Tokens of a text that are sent to be drawn."""
SCORED_TOKENS = 1024
"""Most tokens of a text that the model judges, if its context is longer than this."""
LIKELIEST = 10
"""Tokens that are named for each place."""


def find_tokenizers(runs: str | os.PathLike) -> dict[str, Path]:
    """The folders of saved tokenizers among the runs, by name: a run's own, or one that lies there by itself."""
    folder = Path(runs)
    found = {}
    for entry in sorted(folder.iterdir()) if folder.is_dir() else []:
        for candidate in (entry / "tokenizer", entry):
            if (candidate / "special_tokens.json").is_file():
                found[entry.name] = candidate
                break
    return found


def newest_run(runs: str | os.PathLike) -> Path | None:
    """The run with the checkpoint that was written last, None where there is no run with a tokenizer yet."""
    written = {
        path: path.stat().st_mtime
        for path in Path(runs).glob("*/checkpoints/step_*")
        if (path.parents[1] / "tokenizer").is_dir()
    }
    return max(written, key=lambda path: written[path]).parents[1] if written else None


class Playground:
    """Answers to what the page asks; methods may be called from several threads.

    Args:
        runs: folder of runs, looked through again whenever the page asks what there is.
        run: the model to talk to; None for tokenizers alone.
        name: how the page calls that run.
        gpt2: GPT-2's vocabulary and merges files, for comparison.

    Raises:
        ValueError: the run has no tokenizer, without which it cannot be talked to.
    """

    def __init__(
        self,
        runs: str | os.PathLike,
        run: Run | None = None,
        name: str = "run",
        *,
        gpt2: tuple[Path, Path] | None = None,
    ) -> None:
        self._runs, self._run, self._name, self._gpt2 = runs, run, name, gpt2
        self._loaded: dict[str, tuple[Any, Tokenizer]] = {}
        self._lock = threading.Lock()  # of the tokenizers: two at once would only wait for each other
        if run is not None:
            if run.tokenizer_path is None:
                raise ValueError(f"{name} has no tokenizer/ folder, which turns text into the model's ids")
            self._model_tokenizer = Tokenizer.load(run.tokenizer_path)

    def about(self) -> dict[str, Any]:
        """The tokenizers and the model at hand."""
        model = None
        if self._run is not None:
            model = {
                "name": self._name,
                "parameters": self._run.model.num_parameters,
                "context_length": self._run.config.model.context_length,
                "vocab_size": self._model_tokenizer.vocab_size,
                "step": self._run.step,
            }
        return {"tokenizers": list(self._sources()), "model": model}

    def tokenize(self, tokenizer_id: str, text: str) -> dict[str, Any]:
        """The first tokens of a text, and how many there are.

        Args:
            tokenizer_id: one of those that `about` lists; it is looked up there, never taken for a path.

        Raises:
            KeyError: there is none of that name.
            OSError, ValueError: its files are gone or damaged.
        """
        with self._lock:
            tokenizer = self._tokenizer(tokenizer_id)
            ids = tokenizer.encode_array(text)
        shown = ids[:SHOWN_TOKENS].tolist()
        return {
            "tokens": len(ids),
            "distinct": len(np.unique(ids)),
            "bytes": len(tokenizer.decode_bytes(ids)),
            "vocab_size": tokenizer.vocab_size,
            **_named(tokenizer, shown),
        }

    def score(self, text: str, *, keep_end: bool = False) -> dict[str, Any]:
        """What the model thought of each token of a text before it saw it.

        The text stands behind an end-of-text token, as documents do in training, so that its first token is
        judged too. Of a text longer than the context only the beginning, or the end, is seen.

        Returns:
            `tokens` of the whole text, and where among them the `first` seen one stands; `nats`, the loss of each
            token; `ranks`, one more than the number of tokens that the model found likelier; and in `likeliest` the
            ids and probabilities of the likeliest tokens at each place, with one place more than there are tokens
            where the context has room: the next token. Nothing is known (None) about a first token that stands
            behind no other.

        Raises:
            ValueError: there is no model, or the text cannot be encoded.
        """
        run, tokenizer = self._model()
        with self._lock:
            ids = tokenizer.encode_array(text)
        room = min(run.config.model.context_length, SCORED_TOKENS)
        end_id = tokenizer.special_token_ids.get(run.config.train.end_of_text)
        start = [] if end_id is None else [end_id]
        most = room + 1 - len(start)  # the last one may be judged without being read
        if keep_end and len(ids) > most:
            first, start = len(ids) - room - 1, []
            seen = ids[first:].tolist()
        else:
            first, seen = 0, ids[:most].tolist()
        row, blind = [*start, *seen], [None] * (1 - len(start)) if seen else []
        nats, ranks, likeliest = _judged(run.model, row, room, tokenizer.vocab_size)
        named = {token_id for place in likeliest for token_id, _ in place if token_id in tokenizer.vocab}
        num_bytes = len(tokenizer.decode_bytes(row[1:]))
        return {
            "tokens": len(ids),
            "first": first,
            **_named(tokenizer, seen),
            "nats": blind + [_short(x) for x in nats],
            "ranks": blind + ranks,
            "likeliest": blind + likeliest,
            "names": {token_id: tokenizer.vocab[token_id].hex() for token_id in named},
            "mean_nats": sum(nats) / len(nats) if nats else None,
            "bits_per_byte": sum(nats) / math.log(2) / num_bytes if num_bytes else None,
        }

    def generate(
        self, prompt: str, max_new_tokens: int, *, temperature: float, top_p: float, seed: int | None
    ) -> Iterator[dict[str, Any]]:
        """Continue a text: first how much of it the model sees, then pieces of new text as they come.

        Args:
            prompt: nothing for a new document; of a long one the last tokens count.
            max_new_tokens, temperature, top_p, seed: as for `basic.generation.sampling.generate`.

        Raises:
            ValueError: there is no model, or a setting is out of its range.
        """
        run, tokenizer = self._model()
        with self._lock:
            num_tokens = len(tokenizer.encode_array(prompt))
        yield {"tokens": num_tokens, "seen": min(num_tokens, run.config.model.context_length)}
        end_of_text = run.config.train.end_of_text
        pieces = stream(
            run.model,
            tokenizer,
            run.begun(prompt or end_of_text),
            max_new_tokens,
            temperature=temperature,
            top_k=None,
            top_p=top_p,
            seed=seed,
            end_of_text=end_of_text,
        )
        for piece in pieces:
            yield {"text": piece}

    def _model(self) -> tuple[Run, Tokenizer]:
        if self._run is None:
            raise ValueError("there is no model here; start the playground with a run: local/playground.py runs/NAME")
        return self._run, self._model_tokenizer

    def _sources(self) -> dict[str, Path | tuple[Path, Path]]:
        """Where each tokenizer is read from, by the name that the page knows it by."""
        sources: dict[str, Path | tuple[Path, Path]] = {}
        if self._run is not None and self._run.tokenizer_path is not None:
            sources[self._name] = self._run.tokenizer_path
        sources |= {name: path for name, path in find_tokenizers(self._runs).items() if name not in sources}
        if self._gpt2 is not None and all(path.is_file() for path in self._gpt2):
            sources["GPT-2"] = self._gpt2
        return sources

    def _tokenizer(self, tokenizer_id: str) -> Tokenizer:
        source = self._sources()[tokenizer_id]
        files = source if isinstance(source, tuple) else (source / "special_tokens.json",)
        # A run that was trained anew has another tokenizer under the same name.
        version = (source, *(path.stat().st_mtime_ns for path in files))
        if self._loaded.get(tokenizer_id, (None,))[0] != version:
            if isinstance(source, tuple):
                tokenizer = Tokenizer.from_files(*source, special_tokens=["<|endoftext|>"])
            else:
                tokenizer = Tokenizer.load(source)
            self._loaded[tokenizer_id] = (version, tokenizer)
        return self._loaded[tokenizer_id][1]


@torch.inference_mode()
def _judged(
    model: TransformerLM, row: list[int], room: int, vocab_size: int
) -> tuple[list[float], list[int], list[list[tuple[int, float]]]]:
    """The loss and the rank of each id of a row but the first, and the likeliest ids with their probabilities behind
    each of its first `room` ids."""
    if not row:
        return [], [], []
    device = model.token_embeddings.weight.device
    inputs, targets = (torch.tensor(part, dtype=torch.int64, device=device) for part in (row[:room], row[1:]))
    logits = model(inputs.unsqueeze(0))[0, :, :vocab_size]
    judged = logits[: len(targets)]
    ranks = 1 + (judged > judged.gather(-1, targets.unsqueeze(-1))).sum(-1)
    probabilities, ids = softmax(at_least_float32(logits), -1).topk(min(LIKELIEST, logits.shape[-1]))
    likeliest = [
        [(token_id, _short(p)) for token_id, p in zip(*place, strict=True)]
        for place in zip(ids.tolist(), probabilities.tolist(), strict=True)
    ]
    return token_nats(judged, targets).tolist(), ranks.tolist(), likeliest


def _named(tokenizer: Tokenizer, ids: Sequence[int]) -> dict[str, Any]:
    """Ids with their bytes in hexadecimal, and which of them are special tokens."""
    special = set(tokenizer.special_token_ids.values())
    return {
        "ids": list(ids),
        "pieces": [tokenizer.vocab[token_id].hex() for token_id in ids],
        "special": [place for place, token_id in enumerate(ids) if token_id in special],
    }


def _short(x: float) -> float:
    """Four digits, which is more than anyone reads: a page holds ten thousand of them."""
    return float(f"{x:.4g}")
