"""What faults.py tries with files and texts from outside: damaged files, and naughty strings wherever a text goes."""

from __future__ import annotations

import json
import shutil
import signal
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from fault_commands import BYTES, END, TOKENIZERS, Child, Command, Tries, checkpoint_content

from basic.common import file_sets
from basic.common.errors import BasicError, DamagedFileError
from basic.common.native.cache_files import read_checked
from basic.encoding import encode_file, encode_files
from basic.formats.import_model import open_model
from basic.formats.tokenizers import load_tiktoken
from basic.Tokenizer import Tokenizer
from basic.tokens.opening import open_tokens, read_info
from basic.train_bpe import train_bpe
from basic.training.records.environment import read_environments
from basic.training.records.metrics import read_all_records
from basic.training.run_folder import load_run_config

# --- Damaged files ------------------------------------------------------------------------------------------------


def imported(folder: Path) -> tuple:
    """What local/import.py takes from a folder of transformers, without writing it."""
    model, tokenizer, end_of_text = open_model(folder)
    assert tokenizer is not None
    state = [(name, tensor.numpy().tobytes()) for name, tensor in model.state_dict().items()]
    return state, model.config, tokenizer.fingerprint, end_of_text


def token_content(path: Path) -> tuple:
    return open_tokens(path, verify=True)[:].tobytes(), read_info(path)


def kinds(given: Path) -> dict[str, tuple[str, Callable[[Path], Any]]]:
    """Kind of file: an example in given/, and what it decides there."""
    tokenizers = [f"{folder}/{path.name}" for folder in TOKENIZERS for path in (given / folder).iterdir()]
    hf = [f"hf/{path.name}" for path in (given / "hf").iterdir()]
    sharded = [f"sharded/{path.name}" for path in (given / "sharded").iterdir()]
    encode, trained = partial(_encode_again, given), partial(_train_again, given)
    return {
        "token file": ("train.bin", lambda folder: token_content(folder / "train.bin")),
        "sidecar": ("train.json", lambda folder: token_content(folder / "train.bin")),
        "index": ("dataset/index.json", lambda folder: token_content(folder / "dataset")),
        "shard": ("dataset/000001.bin", lambda folder: token_content(folder / "dataset")),
        "shard, encoded again": ("dataset/000001.bin", encode),
        "shard's sidecar, encoded again": ("dataset/000001.json", encode),
        "manifest, encoded again": ("dataset/manifest.jsonl", encode),
        "counts table": (f"work/{next((given / 'work').glob('*counts*')).name}", trained),
        "manifest of counts": ("work/manifest.jsonl", trained),
        **{name: (name, lambda f, name=name: _tokenizer(f / name.split("/")[0])) for name in sorted(tokenizers)},
        "config.toml": ("run/config.toml", lambda folder: load_run_config(folder / "run")),
        "checksums.json of a run": ("run/checksums.json", lambda folder: load_run_config(folder / "run")),
        "metrics.jsonl": ("run/metrics.jsonl", lambda folder: read_all_records(folder / "run" / "metrics.jsonl")),
        "environment.json": ("run/environment.json", lambda folder: read_environments(folder / "run")),
        "checkpoint": ("last.safetensors", lambda folder: checkpoint_content(folder / "last.safetensors")),
        **{name: (name, lambda folder: checkpoint_content(folder / "sharded")) for name in sorted(sharded)},
        **{name: (name, lambda folder: imported(folder / "hf")) for name in sorted(hf)},
        "cache of a pattern": ("cache/pattern", lambda folder: _cached(folder / "cache/pattern")),
        "cache of a kernel": ("cache/kernel", lambda folder: _cached(folder / "cache/kernel")),
        "rank file": ("ranks.tiktoken", lambda f: load_tiktoken(f / "ranks.tiktoken", pattern="gpt2").fingerprint),
        "tokenizer.json": ("hf/tokenizer.json", lambda f: Tokenizer.load(f / "hf/tokenizer.json").fingerprint),
    }


def _tokenizer(folder: Path) -> tuple:
    tokenizer = Tokenizer.load(folder)
    return tokenizer.fingerprint, tokenizer.pattern, tokenizer.settings


def _cached(path: Path) -> bytes:
    if (content := read_checked(path)) is None:
        raise DamagedFileError("it is compiled again")
    return content


def _encode_again(given: Path, folder: Path) -> dict[str, Any]:
    tokenizer = Tokenizer.load(given / "tokenizer")
    encode_files(tokenizer, given / "text.txt", folder / "dataset", shard_bytes=6000, num_workers=1)
    return token_content(folder / "dataset")


def _train_again(given: Path, folder: Path) -> tuple:
    return train_bpe(given / "text.txt", 300, [END], work_folder=folder / "work", num_workers=1)


def _load(load: Callable[[Path], Any], folder: Path, expected: Any) -> tuple[str, str]:
    """What loading a damaged file comes to, and the place of an unexpected error."""
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        signal.setitimer(signal.ITIMER_REAL, 20)
        try:
            content = load(folder)
        except (BasicError, OSError, MemoryError, FloatingPointError):  # what the scripts print as one line
            return "found", ""
        except Exception as error:
            place = traceback.extract_tb(error.__traceback__)[-1]
            return "traceback", f"{type(error).__name__}: {error!s:.100} at {Path(place.filename).name}:{place.lineno}"
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
    if content == expected:
        return "harmless", ""
    return ("found" if warned else "silent"), ""


def _time_out(*signal_and_frame: object) -> None:
    raise RuntimeError("20 seconds were not enough")


def damage(tries: Tries, flips: int) -> None:
    """Load each kind of file after one bit was flipped, or the end was cut off."""
    file_sets._WAIT_S = 0.0  # between attempts to read a set that somebody may be replacing
    signal.signal(signal.SIGALRM, _time_out)
    work = tries.folder / "damage"
    for kind, (name, load) in kinds(tries.given).items():
        if tries.only and kind not in tries.only:
            continue
        if not (tries.given / name).exists():
            print(f"damage, {kind}: there is no {name}")
            continue
        original = (tries.given / name).read_bytes()
        shutil.rmtree(work, ignore_errors=True)
        shutil.copytree(tries.given, work, symlinks=True)
        expected, counts, examples = load(work), Counter[str](), Counter[str]()
        for _ in range(flips):
            if load.__class__ is partial:  # it writes into the folder
                shutil.rmtree((work / name).parent)
                shutil.copytree((tries.given / name).parent, (work / name).parent)
            position = tries.random.randrange(len(original))
            damaged, after = bytearray(original), "cut"
            if tries.random.random() < 0.75:
                damaged[position] ^= 1 << tries.random.randrange(8)
                after = str(bytes(damaged[max(0, position - 20) : position + 12]))
            else:
                del damaged[position:]
            (work / name).write_bytes(damaged)
            result, what = _load(load, work, expected)
            counts[result] += 1
            before = bytes(original[max(0, position - 20) : position + 12])
            if result == "traceback":
                tries.problem(f"damage, {kind}", what)
            elif result == "silent":
                examples[f"{before} -> {after} at {position} of {len(original)}"] += 1
        print(f"damage, {kind} ({name}, {len(original)} bytes):", dict(sorted(counts.items())), flush=True)
        for example in list(examples)[:6]:
            print("   silent:", example, flush=True)


# --- Naughty strings ----------------------------------------------------------------------------------------------


def naughty(tries: Tries, path: Path) -> None:
    """Use each string as a text, special token, prompt, path and run name: what comes back is equal, or one line."""
    strings = [text for text in json.loads(path.read_text(encoding="utf-8")) if "\0" not in text]
    counts: Counter[str] = Counter()
    plain = Tokenizer.load(tries.given / "tokenizer")
    kernels = Tokenizer(plain.vocab, plain.merges, [END], kernels=True)
    tokenizers = [plain, kernels, Tokenizer.load(tries.given / "cl100k")]
    folder = tries.new_folder(Command(""))
    uses: dict[str, Callable[[str], object]] = {
        "text": lambda text: all(each.decode(each.encode(text)) == text for each in tokenizers),
        "text in a file": lambda text: _through_file(plain, text, folder / "text.txt", text),
        "text in JSON lines": lambda text: _through_file(
            plain, text, folder / "text.jsonl", json.dumps({"text": text})
        ),
        "special token": lambda text: _through_special_token(text, folder / "tokenizer"),
    }
    names = [text for text in strings if text not in ("", ".", "..") and "/" not in text and len(text.encode()) < 240]
    lines: dict[str, tuple[list[str], list[str]]] = {
        "prompt": (strings, ["generate", "given/run", "--prompt={}", "--max-tokens=2", "--device=cpu"]),
        "path of an input": (names, ["encode", "./{}", "out/{}.bin", "--tokenizer=given/tokenizer"]),
        "path of a tokenizer": (names, ["train_bpe", "given/text.txt", "--vocab-size=260", "--output=./{}.folder"]),
        "name of a run": (names, ["train", "--config=given/run.toml", "--steps=4", "--output=runs/{}"]),
        "run in a picture": (names, ["plot", "runs/{}", "given/run", "--output=out/{}.png"]),
        "run in a report": (names, ["report", "runs/{}", "--output=out/{}.html"]),
    }
    for use, function in uses.items():
        for text in strings:
            try:
                counts[f"{use}: {'equal' if function(text) else tries.problem(use, repr(text))}"] += 1
            except BasicError as error:
                counts[f"{use}: refused ({str(error)[:30]})"] += 1
            except Exception as error:
                counts[f"{use}: {tries.problem(use, f'{text!r}: {error!r}')}"] += 1
    for text in names:
        (folder / text).write_text(text, encoding="utf-8", newline="")
    for use, (texts, line) in lines.items():
        for text in texts:
            child = Child([word.replace("{}", text) for word in line], folder)
            result = child.wait()
            shown = text.removeprefix(END)
            if result not in ("ok", "one line") or (result == "ok" and use == "prompt" and shown not in child.output):
                tries.problem(use, f"{text!r}: {result} {child.output[:100]}")
            if result == "ok" and use == "path of an input":
                ids = open_tokens(folder / "out" / f"{text}.bin", verify=True)
                result = (
                    "equal"
                    if plain.decode(ids.tolist()) == text.removeprefix("\ufeff")
                    else tries.problem(use, repr(text))
                )
            if result == "one line":
                result = f"one line ({child.errors.splitlines()[-1][:50]})"
            counts[f"{use}: {result}"] += 1
        if not any(use_and_result.startswith((f"{use}: ok", f"{use}: equal")) for use_and_result in counts):
            tries.problem(use, "every string is refused, so nothing was tried")
    for use, count in counts.items():
        print("naughty,", f"{use}: {count}", flush=True)


def _through_file(tokenizer: Tokenizer, text: str, path: Path, content: str) -> bool:
    path.write_text(content, encoding="utf-8", newline="")
    encode_file(tokenizer, path, path.with_suffix(".bin"))
    # A byte order mark at the start of a file is not text.
    return tokenizer.decode(open_tokens(path.with_suffix(".bin")).tolist()) == text.removeprefix(
        "\ufeff" * (text == content)
    )


def _through_special_token(text: str, folder: Path) -> bool:
    shutil.rmtree(folder, ignore_errors=True)
    tokenizer = Tokenizer(BYTES, [], [text])
    tokenizer.save(folder)
    loaded, inside = Tokenizer.load(folder), f"a{text}b"
    ids = loaded.encode(inside)
    is_equal = loaded.fingerprint == tokenizer.fingerprint and loaded.decode(ids) == inside
    return is_equal and loaded.special_token_ids[text] in ids
