"""The assignment's written questions, answered by code that computes the numbers.

    uv run python -m basic.assignment_question                  # all of them
    uv run python -m basic.assignment_question unicode2         # one
    uv run python -m basic.assignment_question train_bpe_tinystories --corpus TinyStoriesV2-GPT4-train.txt

Each question is a function that returns an `Answer`, whose values can be used and which prints as a page. torch is
imported only by the functions that need it: the processes that train a tokenizer import this module too, and shall
neither wait for torch nor count it as memory of the training.
"""

from __future__ import annotations

import atexit
import io
import multiprocessing
import random
import shutil
import sys
import tempfile
import textwrap
import time
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import cache, partial
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import tyro

from basic.corpus.counting import count_pretokens
from basic.corpus.stories.grammar import stories
from basic.pretokenization import SpecialTokens
from basic.Tokenizer import Tokenizer
from basic.tokens.info import token_dtype
from basic.train_bpe import merges_from_counts

SEPARATOR = "<|endoftext|>"

Value = str | bytes | int | float
Table = Sequence[Mapping[str, Value]]  # rows with the same keys


@dataclass(frozen=True)
class Answer:
    """What a question asks for; `print(answer)` shows it as a page."""

    name: str
    """The question's name in the assignment."""
    values: Mapping[str, Any]
    """Each number or example asked for (a Value), or a Table of them. Units are in the keys."""
    explanation: str
    """What the values mean."""

    def __str__(self) -> str:
        single = {key: value for key, value in self.values.items() if isinstance(value, Value)}
        tables = {key: value for key, value in self.values.items() if not isinstance(value, Value)}
        width = max(map(len, single), default=0)
        blocks = [f"{self.name}\n{'=' * len(self.name)}"]
        blocks += ["\n".join(f"{key:{width}}  {_shown(value)}" for key, value in single.items())] if single else []
        blocks += [f"{title}:\n{_aligned(table)}" for title, table in tables.items()]
        blocks += [textwrap.fill(self.explanation, 110)]
        return "\n\n".join(blocks)


def _aligned(table: Table) -> str:
    """A line for each row, numbers to the right."""
    columns = []
    for key in table[0]:
        cells = [key, *(_shown(row[key]) for row in table)]
        width = max(map(len, cells))
        is_number = isinstance(table[0][key], int | float)
        columns.append([cell.rjust(width) if is_number else cell.ljust(width) for cell in cells])
    return "\n".join(("  " + "  ".join(line)).rstrip() for line in zip(*columns, strict=True))


def _shown(value: Value) -> str:
    if isinstance(value, float):
        return f"{value:,.0f}" if 1000 <= abs(value) < 1e7 else f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) else str(value)


# --- Unicode -------------------------------------------------------------------------------------------------


def unicode1() -> Answer:
    """Which character is chr(0), how does its repr differ from its printed form, and what does it do in text?"""
    null = chr(0)
    rows = [
        {
            "": label,
            "repr": repr(text),
            "bytes that print writes": _printed(text),
            "characters": len(text),
            "visible characters": sum(character.isprintable() for character in text),
        }
        for label, text in (("alone", null), ("in text", f"this is a test{null}string"))
    ]
    name = "NULL" if unicodedata.lookup("NULL") == null else "not NULL"
    return Answer(
        "unicode1",
        {"name": name, "category": unicodedata.category(null), "chr(0)": rows},
        "It is U+0000, the null character, one of the control characters (category Cc). Its repr spells it out as an "
        "escape that could be typed; printing writes the character itself, a byte of value zero, of which most "
        "terminals show nothing. In text it is a character like any other: it keeps its place and counts in the "
        "length, but only the repr tells such a text from one without it.",
    )


def _printed(text: str) -> bytes:
    stream = io.StringIO()
    print(text, end="", file=stream)
    return stream.getvalue().encode()


_SAMPLES = {
    "English": "The quick brown fox jumps over the lazy dog.",
    "German": "Zwölf Boxkämpfer jagen Eva quer über den Sylter Deich.",
    "Russian": "Съешь ещё этих мягких французских булок.",
    "Japanese": "こんにちは、世界。",
    "emoji": "🙂🚀🌍",
}


def unicode2() -> Answer:
    """Why UTF-8 for BPE; a byte string that breaks decoding byte by byte; two bytes that decode to no character."""
    rows = []
    for label, text in _SAMPLES.items():
        # "le" leaves out the byte order mark.
        utf8, utf16, utf32 = (text.encode(encoding) for encoding in ("utf-8", "utf-16-le", "utf-32-le"))
        sizes = {"characters": len(text), "UTF-8": len(utf8), "UTF-16": len(utf16), "UTF-32": len(utf32)}
        zeros = {"zeros in 16": utf16.count(0), "zeros in 32": utf32.count(0)}
        rows.append({"": label, **sizes, **zeros, "text": text})
    broken = "é".encode()
    pairs = [bytes(pair) for pair in product(range(256), repeat=2)]
    undecodable = [pair for pair in pairs if _decoding_error([pair])]
    return Answer(
        "unicode2",
        {
            "breaks when decoded byte by byte": f"{broken}, which is {broken.decode()!r}",
            "the error": _decoding_error([bytes([byte]) for byte in broken]),
            "two bytes that are no text": next(pair for pair in undecodable if pair > b"\xc2"),
            "such pairs, of all 65,536": len(undecodable),
            "bytes in three encodings, and how many of them are zero (in UTF-8 none)": rows,
        },
        "UTF-8 is the smallest for most of what is written, and leaves ASCII as it is, one byte a character. UTF-16 "
        "and UTF-32 pad such text with zeros, which BPE would have to merge away first, and come in two byte orders. "
        "(Japanese alone is smaller in UTF-16.) Outside ASCII a character takes two to four bytes in UTF-8, none of "
        "which is a character by itself, so that decoding each byte alone fails at the first. A first byte from 0xC2 "
        "to 0xF4 calls for continuation bytes, 0x80 to 0xBF: with anything else behind it, or too few of them, two "
        "bytes are no text, nor are they if they begin with a continuation byte.",
    )


def _decoding_error(pieces: Sequence[bytes]) -> str:
    """What Python says of the first piece that is not UTF-8; nothing if all are."""
    try:
        for piece in pieces:
            piece.decode("utf-8")
    except UnicodeDecodeError as error:
        return str(error)
    return ""


# --- Corpora -------------------------------------------------------------------------------------------------


class Training(NamedTuple):
    """A trained tokenizer and what the training took."""

    vocab: dict[int, bytes]
    merges: list[tuple[bytes, bytes]]
    counting_s: float
    merging_s: float
    peak_memory_bytes: int

    def tokenizer(self) -> Tokenizer:
        """A new one, which has nothing in its cache."""
        return Tokenizer(self.vocab, self.merges, [SEPARATOR])

    def learned(self) -> set[bytes]:
        """The tokens that the merges made."""
        return {left + right for left, right in self.merges}


class Corpus(NamedTuple):
    """A text file with SEPARATOR between its documents, and the size of the vocabulary to train on it."""

    label: str
    path: Path
    vocab_size: int

    def training(self) -> Training:
        """Train in a fresh process, whose peak memory is the training's own; once for all questions."""
        return _trained_apart(self.path, self.vocab_size)

    def documents(self, size_bytes: int = 1 << 25) -> list[str]:
        """The whole documents within the first bytes of the file.

        Raises:
            ValueError: there is none, or one is not UTF-8.
        """
        with open(self.path, "rb") as file:
            pieces = file.read(size_bytes).split(SEPARATOR.encode())
            if file.read(1):
                pieces.pop()  # the cut goes through it
        documents = [piece.decode() for piece in pieces if piece.strip()]
        if not documents:
            raise ValueError(
                f"{str(self.path)!r} has no whole document within its first {size_bytes:,} bytes; "
                f"put {SEPARATOR} between its documents"
            )
        return documents


@dataclass(frozen=True, kw_only=True)
class Corpora:
    """The two texts that the questions about tokenizers compare."""

    corpus: Path | None = None
    """TinyStories, with <|endoftext|> between its documents; by default 3 MB of the embedded stories."""
    other_corpus: Path | None = None
    """OpenWebText, likewise; by default embedded stories of another seed."""
    vocab_size: int | None = None
    """Tokens for the first; by default the assignment's 10,000 for a file, 1,000 for the stories."""
    other_vocab_size: int | None = None
    """Tokens for the other; by default the assignment's 32,000 for a file, 2,000 for the stories."""
    seed: int = 0
    """Draws the embedded stories, the sample of documents, and the parameter of learning_rate_tuning."""

    def first(self) -> Corpus:
        """The TinyStories side."""
        return _choose(self.corpus, self.seed, self.vocab_size, for_file=10_000, for_stories=1_000)

    def other(self) -> Corpus:
        """The OpenWebText side."""
        return _choose(self.other_corpus, self.seed + 1, self.other_vocab_size, for_file=32_000, for_stories=2_000)


EMBEDDED = Corpora()


def _choose(path: Path | None, seed: int, vocab_size: int | None, *, for_file: int, for_stories: int) -> Corpus:
    if path is None:
        size = for_stories if vocab_size is None else vocab_size
        return Corpus(f"stories, seed {seed}", embedded_corpus(seed), size)
    return Corpus(path.name, path, for_file if vocab_size is None else vocab_size)


@cache
def embedded_corpus(seed: int) -> Path:
    """A temporary file of 9,000 embedded stories, about 3 MB, that goes when the process ends."""
    folder = Path(tempfile.mkdtemp(prefix="basic-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    path = folder / f"stories-{seed}.txt"
    path.write_bytes("".join(story.text + SEPARATOR for story in stories(seed, 9_000)).encode())
    return path


@cache
def _trained_apart(path: Path, vocab_size: int) -> Training:
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as executor:
        return executor.submit(_train, path, vocab_size).result()


def _train(path: Path, vocab_size: int) -> Training:
    """The two stages of `train_bpe`, with a look at the clock between them."""
    first_tokens = [SEPARATOR.encode(), *(bytes([byte]) for byte in range(256))]
    if vocab_size < len(first_tokens):
        raise ValueError(f"a vocabulary size must be at least {len(first_tokens)}, got {vocab_size}")
    # A spawned process would spawn its workers too: let them start as they do anywhere else.
    multiprocessing.set_start_method(None, force=True)
    start = time.perf_counter()
    counts = count_pretokens(path, SpecialTokens([SEPARATOR]))
    counted = time.perf_counter()
    merges = merges_from_counts(counts, vocab_size - len(first_tokens))
    merged = time.perf_counter()
    vocab = dict(enumerate(first_tokens + [left + right for left, right in merges]))
    return Training(vocab, merges, counted - start, merged - counted, _peak_memory_bytes())


def _peak_memory_bytes() -> int:
    """The most memory that this process held, and on top the most that one of its workers did; 0 if unknown."""
    try:
        import resource
    except ImportError:  # Windows
        return 0
    own, workers = (resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    if sys.platform == "linux":
        # There ru_maxrss begins with what the parent held when it started this process.
        status = Path("/proc/self/status").read_text().splitlines()
        own = next((int(line.split()[1]) for line in status if line.startswith("VmHWM:")), own)
    return (own + workers) * (1 if sys.platform == "darwin" else 1024)


# --- Tokenizers ----------------------------------------------------------------------------------------------


def _training_row(corpus: Corpus) -> dict[str, Value]:
    training = corpus.training()
    learned = training.learned()
    return {
        "corpus": corpus.label,
        "MB": corpus.path.stat().st_size / 1e6,
        "vocabulary": len(training.vocab),
        "time, s": training.counting_s + training.merging_s,
        "of it counting, s": training.counting_s,
        "peak memory, MB": training.peak_memory_bytes / 1e6,
        "bytes a learned token": sum(map(len, learned)) / max(1, len(learned)),
        "longest token": max(sorted(learned), key=len, default=b""),
    }


def train_bpe_tinystories(corpora: Corpora = EMBEDDED) -> Answer:
    """Train on TinyStories: time, memory, longest token, and what takes the most time."""
    training = corpora.first().training()
    counting = training.counting_s / (training.counting_s + training.merging_s)
    return Answer(
        "train_bpe_tinystories",
        {
            "what takes the most time": "counting" if counting > 0.5 else "merging",
            "its share, %": 100 * max(counting, 1 - counting),
            "training": [_training_row(corpora.first())],
        },
        "Counting runs the pattern over every byte of the corpus and grows with it (from a few MB on, several "
        "processes share it); merging sees each distinct pre-token once and grows with the vocabulary. Memory is that "
        "of the training process and of its largest worker. The longest token is something that the corpus repeats: "
        "a word, most often with the space before it, as no merge crosses a pre-token. The assignment asks this of "
        "TinyStories and 10,000 tokens (--corpus FILE); the embedded stories have too few words for as many.",
    )


def train_bpe_expts_owt(corpora: Corpora = EMBEDDED) -> Answer:
    """Train on OpenWebText: longest token, and differences from TinyStories."""
    first, other = corpora.first().training().learned(), corpora.other().training().learned()
    shared = len(first & other)
    return Answer(
        "train_bpe_expts_owt",
        {
            "learned tokens in both": shared,
            "which is of the first's, %": 100 * shared / max(1, len(first)),
            "and of the other's, %": 100 * shared / max(1, len(other)),
            "training": [_training_row(corpora.first()), _training_row(corpora.other())],
        },
        "What both texts repeat is in both vocabularies: common words and pieces of words. Children's stories fill "
        "theirs with the names and plain words of a small world. Text from the web has a long tail: its vocabulary "
        "holds rarer and longer words, pieces of other languages, and what pages repeat by machine, such as rows of "
        "dashes or characters that were decoded wrong, of which its longest token is often one. The assignment asks "
        "this of OpenWebText and 32,000 tokens (--other-corpus FILE); two seeds of the embedded stories differ in "
        "little but the size of the vocabulary.",
    )


def tokenizer_experiments(corpora: Corpora = EMBEDDED) -> Answer:
    """Bytes a token on ten documents of each corpus, also crossed; throughput; why uint16."""
    compression, speed = [], []
    for corpus in (corpora.first(), corpora.other()):
        documents = corpus.documents()
        sample = random.Random(corpora.seed).sample(documents, min(10, len(documents)))
        tokenizer = corpus.training().tokenizer()
        compression.append(
            {
                "documents": f"{len(sample)} of {corpus.label}",
                "tokenizer of the first": bytes_per_token(corpora.first().training().tokenizer(), sample),
                "tokenizer of the other": bytes_per_token(corpora.other().training().tokenizer(), sample),
            }
        )
        bytes_per_s = throughput_bytes_per_s(tokenizer, documents)
        speed.append(
            {
                "tokenizer of": corpus.label,
                "MB/s": bytes_per_s / 1e6,
                "825 GB, hours": 825e9 / bytes_per_s / 3600,
                "largest id": tokenizer.vocab_size - 1,
                "ids as": token_dtype(tokenizer.vocab_size).name,
            }
        )
    return Answer(
        "tokenizer_experiments",
        {"bytes a token": compression, "throughput of one process, the Pile, and the ids": speed},
        "A tokenizer has the longest tokens for the text it was trained on; on other text it falls back to shorter "
        "pieces, which a larger vocabulary makes up for in part. The Pile takes the hours given if this one process "
        "encodes it alone. uint16 holds the ids up to 65,535, more than 10,000 or 32,000 tokens need, in two bytes, "
        "half of what 32 bits take; unsigned, because no id is negative. Real numbers need the assignment's corpora: "
        "--corpus FILE (TinyStories) and --other-corpus FILE (OpenWebText).",
    )


def bytes_per_token(tokenizer: Tokenizer, documents: Sequence[str]) -> float:
    """How many bytes of UTF-8 one token stands for, over all the documents."""
    num_tokens = sum(len(tokenizer.encode(document)) for document in documents)
    return sum(len(document.encode()) for document in documents) / num_tokens


def throughput_bytes_per_s(tokenizer: Tokenizer, documents: Sequence[str]) -> float:
    """How many bytes of UTF-8 the tokenizer encodes in a second: measured, on at most 4 million characters."""
    text = SEPARATOR.join(documents)[:4_000_000]
    start = time.perf_counter()
    tokenizer.encode(text)
    return len(text.encode()) / (time.perf_counter() - start)


# --- Models --------------------------------------------------------------------------------------------------


def transformer_accounting() -> Answer:
    """Parameters, memory and matrix products of GPT-2 XL, of its smaller siblings, and with a long context."""
    from basic.analysis.accounting import gpt2_forward

    values = gpt2_forward()
    return Answer(
        "transformer_accounting",
        values,
        "L layers, d = d_model, F = d_ff, V token ids; a product of (m x k) and (k x n) takes 2 m k n FLOPs, for one "
        "sequence of whole context. The feed-forward layers take the most, then the projections of attention. In each "
        "layer both grow with the square of d, scores and weighted sums only with d, and the output embedding is there "
        "only once: the larger the model, the more goes into the former and the less into the latter. A context 16 "
        "times as long makes scores and weighted sums 256 times as much and the rest 16 times, together "
        f"{values['context 16,384: times as many']:.1f} times: then those take the most.",
    )


def learning_rate_tuning(seed: int = 0) -> Answer:
    """The toy: ten steps of SGD whose rate falls with the root of the step, with lr 10, 100 and 1000."""
    losses = {f"lr {lr}": toy_losses(lr, num_steps=10, seed=seed) for lr in (10, 100, 1000)}
    verdicts = {lr: "decays" if after[-1] < after[0] else "diverges" for lr, after in losses.items()}
    return Answer(
        "learning_rate_tuning",
        verdicts
        | {"loss": [{"after step": step} | {lr: after[step] for lr, after in losses.items()} for step in range(11)]},
        "The loss is the mean of 100 squares, so step t, from 0, multiplies each weight by 1 - lr / (50 sqrt(t + 1)). "
        "For 10 the factor is 0.8 at first and nears 1: a slow decay. For 100 it is -1, which leaves the loss as it is "
        "once, then small, and zero but for rounding at t = 3: the fastest. For 1000 it is -19 at first, and the loss "
        "grows at each of the ten steps; the falling rate would turn it only from t = 100 on.",
    )


def toy_losses(lr: float, num_steps: int, seed: int = 0) -> list[float]:
    """The loss before the first step and after each one."""
    import torch

    class DecayingSGD(torch.optim.Optimizer):
        """Plain gradient descent at the rate lr / sqrt(t + 1), as in the handout's example."""

        @torch.no_grad()
        def step(self, closure: Any = None) -> Any:
            for group in self.param_groups:
                for parameter in group["params"]:
                    t = self.state[parameter].setdefault("t", 0)
                    parameter -= group["lr"] / (t + 1) ** 0.5 * parameter.grad
                    self.state[parameter]["t"] = t + 1

    weights = torch.nn.Parameter(5 * torch.randn(10, 10, generator=torch.Generator().manual_seed(seed)))
    optimizer = DecayingSGD([weights], {"lr": lr})
    losses = []
    for _ in range(num_steps):
        optimizer.zero_grad()
        loss = weights.square().mean()
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
    return [*losses, weights.square().mean().item()]


def adamw_accounting() -> Answer:
    """Peak memory of training, the largest batch in 80 GB, FLOPs of a step, and hours of training."""
    from basic.analysis.accounting import gpt2_training

    return Answer(
        "adamw_accounting",
        gpt2_training(),
        "B sequences of T tokens, L layers, d = d_model, h heads, F = d_ff, V token ids. Parameters, gradients and the "
        "two moments stay whatever the batch; activations, one tensor for each operation, grow with it, most of all "
        "the T x T scores and their softmax. The cross-entropy is one number, but its gradient needs the probability "
        "of every token id. The peak counts all of this at once. The hours are those of the matrix products, forward "
        "and twice as many backward, and of AdamW, which is nothing beside them, on one H100 at half of 495 TFLOP/s.",
    )


# --- Command line --------------------------------------------------------------------------------------------


def questions(corpora: Corpora = EMBEDDED) -> dict[str, Callable[[], Answer]]:
    """The assignment's questions by name, in its order."""
    return {
        "unicode1": unicode1,
        "unicode2": unicode2,
        "train_bpe_tinystories": partial(train_bpe_tinystories, corpora),
        "train_bpe_expts_owt": partial(train_bpe_expts_owt, corpora),
        "tokenizer_experiments": partial(tokenizer_experiments, corpora),
        "transformer_accounting": transformer_accounting,
        "learning_rate_tuning": partial(learning_rate_tuning, corpora.seed),
        "adamw_accounting": adamw_accounting,
    }


def main(name: tyro.conf.Positional[str] = "all", corpora: tyro.conf.OmitArgPrefixes[Corpora] = EMBEDDED) -> None:
    """Print the answers to the assignment's written questions.

    Args:
        name: the question's name in the assignment, or all.
        corpora: the texts.
    """
    answers = questions(corpora)
    if name not in {"all", *answers}:
        raise SystemExit(f"there is no question {name!r}; the questions are: all, {', '.join(answers)}")
    try:
        for answer in answers.values() if name == "all" else [answers[name]]:
            print(answer(), end="\n\n\n", flush=True)
    except (OSError, ValueError) as error:
        raise SystemExit(f"error: {error}") from None


if __name__ == "__main__":
    tyro.cli(main, description=f"Answer the assignment's written questions: all, or one of {', '.join(questions())}.")
