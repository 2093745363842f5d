"""Answers to the assignment's written questions; the numbers are computed.

    uv run basic questions                  # all questions
    uv run basic questions unicode2         # one question
    uv run basic questions train_bpe_tinystories --corpus TinyStoriesV2-GPT4-train.txt

Each question is a function that returns an `Answer`. Only the functions that need torch import it, because the process
that trains a tokenizer imports this module too, and its memory is measured.
"""

from __future__ import annotations

import atexit
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
from typing import Annotated, Any, NamedTuple

import tyro

from basic.common import command_line
from basic.common.errors import InvalidInputError
from basic.common.progress import peak_memory_bytes
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
    """The answer to a question; `str(answer)` formats it for printing."""

    name: str
    """The question's name in the assignment."""
    values: Mapping[str, Any]
    """Label to number or example (a Value), or to a Table of them; labels contain the units."""
    explanation: str

    def __str__(self) -> str:
        single = {key: value for key, value in self.values.items() if isinstance(value, Value)}
        tables = {key: value for key, value in self.values.items() if not isinstance(value, Value)}
        width = max(map(len, single), default=0)
        blocks = [f"{self.name}\n{'=' * len(self.name)}"]
        blocks += ["\n".join(f"{key:{width}}  {_format(value)}" for key, value in single.items())] if single else []
        blocks += [f"{title}:\n{_format_table(table)}" for title, table in tables.items()]
        blocks += [textwrap.fill(self.explanation, 110)]
        return "\n\n".join(blocks)


def _format_table(table: Table) -> str:
    """Format a table with one line per row; numbers are aligned to the right."""
    columns = []
    for key in table[0]:
        cells = [key, *(_format(row[key]) for row in table)]
        width = max(map(len, cells))
        is_number = isinstance(table[0][key], int | float)
        columns.append([cell.rjust(width) if is_number else cell.ljust(width) for cell in cells])
    return "\n".join(("  " + "  ".join(line)).rstrip() for line in zip(*columns, strict=True))


def _format(value: Value) -> str:
    if isinstance(value, float):
        return f"{value:,.0f}" if 1000 <= abs(value) < 1e7 else f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) else str(value)


# --- Unicode ------------------------------------------------------------------------------------------------


def unicode1() -> Answer:
    """Which character is chr(0), how does its repr differ from its printed form, and what does it do in text?"""
    null = chr(0)
    rows = [
        {
            "": label,
            "repr": repr(text),
            "printed bytes": text.encode(),
            "characters": len(text),
            "visible characters": sum(character.isprintable() for character in text),
        }
        for label, text in (("alone", null), ("in text", f"this is a test{null}string"))
    ]
    name = "NULL" if unicodedata.lookup("NULL") == null else "not NULL"
    return Answer(
        "unicode1",
        {"name": name, "category": unicodedata.category(null), "chr(0)": rows},
        "chr(0) is U+0000, the null character, a control character (category Cc). Its repr is an escape sequence; "
        "printing writes the character itself, a zero byte, which most terminals do not show. In text it counts as one "
        "character, but only the repr makes it visible.",
    )


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
        # The "le" variants omit the byte order mark.
        utf8, utf16, utf32 = (text.encode(encoding) for encoding in ("utf-8", "utf-16-le", "utf-32-le"))
        sizes = {"characters": len(text), "UTF-8": len(utf8), "UTF-16": len(utf16), "UTF-32": len(utf32)}
        zeros = {"zeros in UTF-16": utf16.count(0), "zeros in UTF-32": utf32.count(0)}
        rows.append({"": label, **sizes, **zeros, "text": text})
    example = "é".encode()
    pairs = [bytes(pair) for pair in product(range(256), repeat=2)]
    invalid_pairs = [pair for pair in pairs if _decoding_error([pair])]
    return Answer(
        "unicode2",
        {
            "fails when decoded byte by byte": f"{example}, which is {example.decode()!r}",
            "the error": _decoding_error([bytes([byte]) for byte in example]),
            "two bytes that are not UTF-8": next(pair for pair in invalid_pairs if pair > b"\xc2"),
            "such pairs, of all 65,536": len(invalid_pairs),
            "bytes in three encodings, and how many of them are zero (in UTF-8 none)": rows,
        },
        "UTF-8 is the shortest encoding for most text, and ASCII takes one byte per character. UTF-16 and UTF-32 pad "
        "such text with zeros, which BPE would have to merge first, and exist in two byte orders. (Only the Japanese "
        "text is shorter in UTF-16.) A character outside ASCII takes two to four bytes in UTF-8, and none of them is a "
        "character alone, so decoding each byte separately fails. A first byte from 0xC2 to 0xF4 needs continuation "
        "bytes, 0x80 to 0xBF; with another byte after it, or with too few of them, the bytes are not UTF-8. Neither "
        "are bytes that start with a continuation byte.",
    )


def _decoding_error(strings: Sequence[bytes]) -> str:
    """Return Python's message for the first string that is not UTF-8; empty if all are."""
    try:
        for string in strings:
            string.decode("utf-8")
    except UnicodeDecodeError as error:
        return str(error)
    return ""


# --- Corpora ------------------------------------------------------------------------------------------------


class Training(NamedTuple):
    """A trained tokenizer, and the time and memory that its training took."""

    vocab: dict[int, bytes]
    merges: list[tuple[bytes, bytes]]
    counting_s: float
    merging_s: float
    peak_memory_bytes: int

    def tokenizer(self) -> Tokenizer:
        """Create the tokenizer, with an empty cache."""
        return Tokenizer(self.vocab, self.merges, [SEPARATOR])

    def learned(self) -> set[bytes]:
        """Return the tokens that merges created."""
        return {left + right for left, right in self.merges}


class Corpus(NamedTuple):
    """A text file with SEPARATOR between documents, and the vocabulary size to train with."""

    label: str
    path: Path
    vocab_size: int

    def training(self) -> Training:
        """Train in a new process, whose peak memory is that of the training; the result is cached."""
        return _train_in_process(self.path, self.vocab_size)

    def documents(self, size_bytes: int = 1 << 25) -> list[str]:
        """Return the complete documents in the first `size_bytes` of the file.

        Raises:
            InvalidInputError: no document is complete.
        """
        with open(self.path, "rb") as file:
            documents = file.read(size_bytes).split(SEPARATOR.encode())
            if file.read(1):
                documents.pop()  # the last one is incomplete
        texts = [document.decode() for document in documents if document.strip()]
        if not texts:
            raise InvalidInputError(
                f"{str(self.path)!r} has no complete document in its first {size_bytes:,} bytes; "
                f"put {SEPARATOR} between its documents"
            )
        return texts


@dataclass(frozen=True, kw_only=True)
class Corpora:
    """The two corpora that the questions about tokenizers compare."""

    corpus: Path | None = None
    """TinyStories, with <|endoftext|> between documents; None: 3 MB of the embedded stories."""
    other_corpus: Path | None = None
    """OpenWebText, with <|endoftext|> between documents; None: embedded stories of another seed."""
    vocab_size: int | None = None
    """Vocabulary size for the first corpus; None: 10,000 for a file (as in the assignment), 1,000 for the stories."""
    other_vocab_size: int | None = None
    """Vocabulary size for the other corpus; None: 32,000 for a file (as in the assignment), 2,000 for the stories."""
    seed: int = 0
    """Seed of the embedded stories, the sample of documents, and the parameters of learning_rate_tuning."""

    def first(self) -> Corpus:
        """Return the first corpus (TinyStories)."""
        return _corpus(self.corpus, self.vocab_size, self.seed, default_sizes=(1_000, 10_000))

    def other(self) -> Corpus:
        """Return the other corpus (OpenWebText)."""
        return _corpus(self.other_corpus, self.other_vocab_size, self.seed + 1, default_sizes=(2_000, 32_000))


EMBEDDED = Corpora()


def _corpus(path: Path | None, vocab_size: int | None, seed: int, default_sizes: tuple[int, int]) -> Corpus:
    """Return the corpus of a file, or of embedded stories; the default sizes are for the stories and for a file."""
    if vocab_size is None:
        vocab_size = default_sizes[path is not None]
    if path is None:
        return Corpus(f"stories, seed {seed}", embedded_corpus(seed), vocab_size)
    return Corpus(path.name, path, vocab_size)


@cache
def embedded_corpus(seed: int) -> Path:
    """Write 9,000 embedded stories, about 3 MB, to a temporary file that is removed when the process exits."""
    folder = Path(tempfile.mkdtemp(prefix="basic-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    path = folder / f"stories-{seed}.txt"
    path.write_bytes("".join(story.text + SEPARATOR for story in stories(seed, 9_000)).encode())
    return path


@cache
def _train_in_process(path: Path, vocab_size: int) -> Training:
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as executor:
        return executor.submit(_train, path, vocab_size).result()


def _train(path: Path, vocab_size: int) -> Training:
    """Run the two stages of `train_bpe` and measure each."""
    first_tokens = [SEPARATOR.encode(), *(bytes([byte]) for byte in range(256))]
    if vocab_size < len(first_tokens):
        raise InvalidInputError(f"a vocabulary size must be at least {len(first_tokens)}, got {vocab_size}")
    multiprocessing.set_start_method(None, force=True)  # a spawned process would also spawn its workers
    start = time.perf_counter()
    counts = count_pretokens(path, SpecialTokens([SEPARATOR]))
    counted = time.perf_counter()
    merges = merges_from_counts(counts, vocab_size - len(first_tokens))
    merged = time.perf_counter()
    vocab = dict(enumerate(first_tokens + [left + right for left, right in merges]))
    return Training(vocab, merges, counted - start, merged - counted, _peak_memory_bytes())


def _peak_memory_bytes() -> int:
    """Return the peak memory of this process plus that of its largest worker; 0 if unknown."""
    own, workers = peak_memory_bytes()
    if sys.platform == "linux":
        # On Linux the first one includes the memory of the parent at the time of the fork.
        status = Path("/proc/self/status").read_text().splitlines()
        own = next((1024 * int(line.split()[1]) for line in status if line.startswith("VmHWM:")), own)
    return own + workers


# --- Tokenizers ---------------------------------------------------------------------------------------------


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
        "bytes per learned token": sum(map(len, learned)) / max(1, len(learned)),
        "longest token": max(sorted(learned), key=len, default=b""),
    }


def train_bpe_tinystories(corpora: Corpora = EMBEDDED) -> Answer:
    """Train on TinyStories: time, memory, longest token, and what takes the most time."""
    training = corpora.first().training()
    counting = training.counting_s / (training.counting_s + training.merging_s)
    return Answer(
        "train_bpe_tinystories",
        {
            "slower stage": "counting" if counting > 0.5 else "merging",
            "its share of the time, %": 100 * max(counting, 1 - counting),
            "training": [_training_row(corpora.first())],
        },
        "Counting applies the pattern to every byte, so its time grows with the corpus (from a few MB on, it runs in "
        "several processes). Merging processes each distinct pre-token, and its time grows with the vocabulary. Memory "
        "is that of the training process plus its largest worker. The longest token is a frequent word, usually with "
        "the space before it, since merges do not cross pre-tokens. The assignment asks for TinyStories and 10,000 "
        "tokens (--corpus FILE); the embedded stories have too few words for that.",
    )


def train_bpe_expts_owt(corpora: Corpora = EMBEDDED) -> Answer:
    """Train on OpenWebText: longest token, and differences from TinyStories."""
    first, other = corpora.first().training().learned(), corpora.other().training().learned()
    shared = len(first & other)
    return Answer(
        "train_bpe_expts_owt",
        {
            "learned tokens in both": shared,
            "of the first corpus's, %": 100 * shared / max(1, len(first)),
            "of the other's, %": 100 * shared / max(1, len(other)),
            "training": [_training_row(corpora.first()), _training_row(corpora.other())],
        },
        "Both vocabularies contain common words and subwords. The vocabulary of children's stories consists mainly of "
        "names and simple words. Web text has a long tail: rarer and longer words, subwords of other languages, and "
        "repeated strings of web pages, such as rows of dashes or wrongly decoded characters; its longest token is "
        "often one of these. The assignment asks for OpenWebText and 32,000 tokens (--other-corpus FILE); two seeds of "
        "the embedded stories differ in little but the size of the vocabulary.",
    )


def tokenizer_experiments(corpora: Corpora = EMBEDDED) -> Answer:
    """Bytes per token on ten documents of each corpus, also with the other tokenizer; throughput; why uint16."""
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
                "dtype": token_dtype(tokenizer.vocab_size).name,
            }
        )
    return Answer(
        "tokenizer_experiments",
        {"bytes per token": compression, "throughput of one process, time for the Pile, and ids": speed},
        "A tokenizer compresses the text that it was trained on best. On other text it uses shorter tokens; a larger "
        "vocabulary partly compensates. The hours for the Pile (825 GB) are for one process. uint16 holds ids up to "
        "65,535, more than 10,000 or 32,000 tokens need, in two bytes, half of what 32 bits take; ids are never "
        "negative. Representative numbers need the assignment's corpora: --corpus FILE (TinyStories) and "
        "--other-corpus FILE (OpenWebText).",
    )


def bytes_per_token(tokenizer: Tokenizer, documents: Sequence[str]) -> float:
    """Return the UTF-8 bytes of all documents divided by the number of their tokens."""
    num_tokens = sum(len(tokenizer.encode(document)) for document in documents)
    return sum(len(document.encode()) for document in documents) / num_tokens


def throughput_bytes_per_s(tokenizer: Tokenizer, documents: Sequence[str]) -> float:
    """Measure the encoding speed in UTF-8 bytes per second, on at most 4 million characters."""
    text = SEPARATOR.join(documents)[:4_000_000]
    start = time.perf_counter()
    tokenizer.encode(text)
    return len(text.encode()) / (time.perf_counter() - start)


# --- Models -------------------------------------------------------------------------------------------------


def transformer_accounting() -> Answer:
    """Parameters, memory and matrix multiplications of GPT-2 XL, of the smaller models, and with a long context."""
    from basic.analysis.accounting import gpt2_forward

    values = gpt2_forward()
    return Answer(
        "transformer_accounting",
        values,
        "L layers, d = d_model, F = d_ff, V token ids. Multiplying (m x k) by (k x n) takes 2 m k n FLOPs; all numbers "
        "are for one sequence of full context length. The feed-forward layers take the most FLOPs, then the "
        "projections of attention. Per layer, both grow with d^2, the attention scores and the weighted sum only with "
        "d, and the output embedding occurs only once: the larger the model, the larger the share of the former. With "
        "a context 16 times as long, scores and weighted sum take 256 times as many FLOPs and the rest 16 times as "
        f"many, in total {values['ratio of FLOPs, context 16,384 to 1,024']:.1f} times; scores and weighted sum then "
        "take the most.",
    )


def learning_rate_tuning(seed: int = 0) -> Answer:
    """The toy example: ten steps of SGD with rate lr / sqrt(t + 1), for lr 10, 100 and 1000."""
    losses = {f"lr {lr}": toy_losses(lr, num_steps=10, seed=seed) for lr in (10, 100, 1000)}
    outcomes = {lr: "decays" if curve[-1] < curve[0] else "diverges" for lr, curve in losses.items()}
    rows = [{"after step": step} | {lr: curve[step] for lr, curve in losses.items()} for step in range(11)]
    return Answer(
        "learning_rate_tuning",
        outcomes | {"loss": rows},
        "The loss is the mean of 100 squares, so step t (from 0) multiplies each weight by 1 - lr / (50 sqrt(t + 1)). "
        "For lr 10 the factor starts at 0.8 and approaches 1: a slow decay. For lr 100 it starts at -1, which leaves "
        "the loss unchanged, then becomes small, and is 0 (up to rounding) at t = 3: the fastest decay. For lr 1000 it "
        "starts at -19, and the loss grows at each of the ten steps; it would decrease only from t = 100 on.",
    )


def toy_losses(lr: float, num_steps: int, seed: int = 0) -> list[float]:
    """Run SGD with the rate lr / sqrt(t + 1); return the loss before the first step and after each step."""
    import torch

    weights = torch.nn.Parameter(5 * torch.randn(10, 10, generator=torch.Generator().manual_seed(seed)))
    losses = []
    for t in range(num_steps + 1):
        loss = weights.square().mean()
        losses.append(loss.item())
        (gradient,) = torch.autograd.grad(loss, weights)
        with torch.no_grad():
            weights -= lr / (t + 1) ** 0.5 * gradient
    return losses


def adamw_accounting() -> Answer:
    """Peak memory of training, the largest batch in 80 GB, FLOPs of a step, and hours of training."""
    from basic.analysis.accounting import gpt2_training

    return Answer(
        "adamw_accounting",
        gpt2_training(),
        "B sequences of T tokens, L layers, d = d_model, h heads, F = d_ff, V token ids. Memory for parameters, "
        "gradients and the two moments does not depend on the batch. Memory for activations, one tensor per operation, "
        "is proportional to it; the T x T scores and their softmax take the most. The cross-entropy is a scalar, but "
        "its gradient needs the probability of every token id. The peak is the sum of all these. The hours are for the "
        "matrix multiplications, forward and twice as many backward, and AdamW, which is negligible, on one H100 at "
        "50% of 495 TFLOP/s.",
    )


# --- Command line -------------------------------------------------------------------------------------------


def questions(corpora: Corpora = EMBEDDED) -> dict[str, Callable[[], Answer]]:
    """Return the assignment's questions by name, in its order."""
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


def main(
    name: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="[QUESTION]", help="Its name, or all.")] = "all",
    corpora: tyro.conf.OmitArgPrefixes[Corpora] = EMBEDDED,
) -> None:
    """Print the answers to the assignment's written questions."""
    answers = questions(corpora)
    if name not in {"all", *answers}:
        raise InvalidInputError(f"there is no question {name!r}; the questions are: all, {', '.join(answers)}")
    for answer in answers.values() if name == "all" else [answers[name]]:
        print(answer(), end="\n\n\n", flush=True)


def command() -> None:
    text = f"Answer the assignment's written questions: all, or one of {', '.join(questions())}."
    tyro.cli(main, description=textwrap.fill(text, 79, initial_indent=" ", subsequent_indent=" "))


if __name__ == "__main__":
    command_line.run(command)
