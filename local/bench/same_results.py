"""Check that two versions of the code give equal results: vocabularies, ids, weights, losses, exported files.

    PYTHONPATH=OLD uv run local/bench/same_results.py old.json
    uv run local/bench/same_results.py new.json --compare old.json

PYTHONPATH selects the version, including its scripts in local/. The weights of a CPU run are equal to the last bit only
on the same machine, so run both there. Each takes some minutes.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tyro

import basic

REPOSITORY = Path(basic.__file__).resolve().parents[1]
END = "<|endoftext|>"
PATTERNS = ("gpt2", "cl100k", "o200k")
RUN = {
    **{"vocab_size": 10_000, "context_length": 64, "d_model": 64, "num_layers": 2, "num_heads": 4, "d_ff": 128},
    **{"steps": 20, "batch_size": 8, "warmup_steps": 5, "log_interval": 1, "eval_interval": 10, "eval_batches": 2},
    **{"sample_interval": 10, "sample_tokens": 32, "checkpoint_interval": 10, "device": "cpu"},
}


@dataclass(frozen=True, kw_only=True)
class Options:
    output: tyro.conf.Positional[Path]
    """JSON file to write: the name of each result and its value or SHA-256."""
    compare: Path | None = None
    """File written by another version; prints every difference, and exits with status 1 if there is one."""
    data: Path = Path(__file__).resolve().parents[3] / "shared" / "data"
    """Folder with the texts and with GPT-2's vocabulary."""


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def run_script(name: str, *arguments: object, threads: int = 1, **options: object) -> str:
    """Run a script of the imported version and return its output."""
    flags = [f"--{key.replace('_', '-')}={value}" for key, value in options.items()]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": str(threads)}
    command = [sys.executable, str(REPOSITORY / "local" / f"{name}.py"), *map(str, arguments), *flags]
    done = subprocess.run(command, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"local/{name}.py of {REPOSITORY} failed: {done.stderr[-2000:]}")
    return done.stdout


def tensor_digest(tensors: dict[str, Any]) -> str:
    """SHA-256 of the names, dtypes, shapes and bytes of tensors."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        array = tensor.detach().contiguous().numpy()
        digest.update(f"{name} {array.dtype} {array.shape}".encode() + array.tobytes())
    return digest.hexdigest()


def token_results(data: Path, folder: Path) -> Iterator[tuple[str, Any]]:
    """A vocabulary of 10,000, two token files encoded with it, and a dataset of several token files."""
    tokenizer = folder / "tokenizer"
    run_script("train_bpe", data / "novels_train.txt", output=tokenizer)
    for name in ("vocab.json", "merges.txt", "special_tokens.json"):
        yield f"tokenizer/{name}", sha256((tokenizer / name).read_bytes())
    for name, split in (("train.bin", "train"), ("valid.bin", "valid"), ("dataset", "valid")):
        options = {} if name.endswith(".bin") else {"shard_bytes": 500_000}
        run_script("encode", data / f"novels_{split}.txt", folder / name, tokenizer=tokenizer, **options)
        for path in sorted((folder / name).glob("*.bin")) or [folder / name]:
            yield f"{path.relative_to(folder)}", sha256(path.read_bytes())
            for key, value in json.loads(path.with_suffix(".json").read_text()).items():
                yield f"{path.relative_to(folder)}: {key}", value


def run_results(folder: Path, threads: int) -> Iterator[tuple[str, Any]]:
    """The weights, losses and samples of a short run, its exported files, and text generated with it."""
    from safetensors.torch import load_file

    from basic.training import load_run

    run, exported = folder / f"run_{threads}", folder / f"hf_{threads}"
    files = {"train_tokens": folder / "train.bin", "valid_tokens": folder / "valid.bin"}
    run_script("train", threads=threads, **RUN, **files, tokenizer=folder / "tokenizer", output=run)
    for path in sorted((run / "checkpoints").glob("*.safetensors")):
        yield f"{run.name}/{path.name}", tensor_digest(load_file(path))
    yield f"{run.name}: model", tensor_digest(dict(load_run(run, device="cpu").model.state_dict()))
    for number, line in enumerate((run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()):
        record = json.loads(line)
        for key in ("kind", "step", "train_loss", "valid_loss", "gradient_norm", "learning_rate", "tokens", "text"):
            if key in record:
                yield f"{run.name}/metrics.jsonl line {number}: {key}", record[key]
    yield f"{run.name}/samples.txt", sha256((run / "samples.txt").read_bytes())
    for name, options in (("likeliest", {"temperature": 0}), ("drawn", {"seed": 1})):
        text = run_script("generate", run, prompt="It was", max_tokens=40, device="cpu", **options)
        yield f"{run.name}: generated, {name}", text
    run_script("export", run, exported)
    for path in sorted(exported.iterdir()):
        yield f"{exported.name}/{path.name}", sha256(path.read_bytes())


def id_results(data: Path) -> Iterator[tuple[str, Any]]:
    """The ids of every text under three patterns, with and without kernels, and the decoded text."""
    from basic.Tokenizer import Tokenizer

    paths = [path for path in sorted(data.iterdir()) if path.suffix in (".txt", ".en", ".json", ".bin")]
    texts = {path.name: path.read_bytes() for path in paths if path.name != "gpt2_vocab.json"}
    files = data / "gpt2_vocab.json", data / "gpt2_merges.txt"
    for pattern in PATTERNS:
        fast, plain = (
            Tokenizer.from_files(*files, [END], pattern=pattern, kernels=kernels) for kernels in (True, False)
        )
        yield f"{pattern}: fingerprint", fast.fingerprint
        for name, text in texts.items():
            ids = fast.encode_array(text, errors="replace")
            yield f"{pattern} {name}: kernels", sha256(ids.astype("<u4").tobytes())
            yield f"{pattern} {name}: decoded", sha256(fast.decode(ids.tolist()).encode())
            if len(text) < 6_000_000:
                ids = np.array(plain.encode(text.decode(errors="replace")), "<u4")
                yield f"{pattern} {name}: plain", sha256(ids.tobytes())


def main(options: Options) -> None:
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for group in (token_results(options.data, folder), *(run_results(folder, threads) for threads in (1, 2))):
            results |= group
        results |= id_results(options.data)
    options.output.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    print(f"{len(results)} results of {REPOSITORY} are in {options.output}")
    if options.compare is not None:
        others = json.loads(options.compare.read_text(encoding="utf-8"))
        pairs = {name: (results.get(name, "missing"), others.get(name, "missing")) for name in results | others}
        differing = [name for name, (new, old) in pairs.items() if new != old]
        for name in differing:
            print("{}: {} here, {} there".format(name, *pairs[name]))
        print(f"{len(pairs) - len(differing)} are equal, {len(differing)} differ")
        sys.exit(bool(differing))


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
