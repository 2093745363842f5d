"""Text of any size: every executor gives the result of one process, and finished tasks survive a crash."""

import dataclasses
import gzip
import itertools
import json
import os
import select
import signal
import sys
import threading
import time
import tracemalloc
from collections import Counter
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import dask
import numpy as np
import pytest
from distributed import LocalCluster
from hypothesis import given, settings
from hypothesis import strategies as st

from basic.bpe import compiled, loading
from basic.bpe.arrays import PretokenCounts
from basic.common.errors import DamagedFileError, InvalidInputError
from basic.corpus.count_tables import concatenate, merge_tables, read_table, sorted_table, write_table
from basic.corpus.counting import ShardCounting, count_pretokens, count_shard
from basic.corpus.shards import entire_source, split_into_shards
from basic.corpus.sources import TextSource, expand_inputs
from basic.corpus.work_folder import WorkFolder, dask_executor, local_executor
from basic.encoding import encode_file, encode_files
from basic.pretokenization import SpecialTokens
from basic.Tokenizer import Tokenizer
from basic.tokens.opening import open_tokens
from basic.train_bpe import arrays_for_kernels, train_bpe
from tests.fixtures.make_tokenizer_fixtures import SAMPLE, naive_pretoken_counts
from tests.helpers.dying_worker import die, die_once
from tests.project.test_scripts import run_script

END = "<|endoftext|>"
SPECIAL = SpecialTokens([END])
TEXT = SAMPLE.read_bytes().decode()


@pytest.fixture(scope="module")
def scheduler():
    """The address of a cluster of two processes; if both stay dead, there is an error."""
    with (
        dask.config.set({"distributed.scheduler.no-workers-timeout": "60s"}),
        LocalCluster(n_workers=2, threads_per_worker=1, processes=True, dashboard_address=":0") as local,
    ):
        yield local.scheduler_address


@pytest.fixture
def corpus(tmp_path: Path) -> list[Path]:
    """Files of every kind, one of them twice."""
    folder = tmp_path / "corpus"
    folder.mkdir()
    (folder / "plain.txt").write_text(TEXT * 3, newline="")
    (folder / "packed.txt.gz").write_bytes(gzip.compress(TEXT[::-1].encode()))
    lines = [json.dumps({"text": document}) for document in TEXT.split("\n")]
    (folder / "lines.jsonl").write_text("\n".join(lines))
    (folder / "empty.txt").touch()
    names = ("plain.txt", "packed.txt.gz", "empty.txt", "lines.jsonl", "plain.txt")
    return [folder / name for name in names]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer(*train_bpe(SAMPLE, 400, [END], kernels=False), [END], kernels=False)


class Inline(Executor):
    """Runs each task in `submit`; after some tasks it stops as Ctrl-C does."""

    def __init__(self, num_tasks: float = float("inf")) -> None:
        self.left, self.names = num_tasks, []

    def submit(self, fn, /, *args, **kwargs):
        if self.left <= 0:
            raise KeyboardInterrupt
        self.left -= 1
        self.names.append(Path(args[-1]).name)
        future = Future()
        try:
            future.set_result(fn(*args, **kwargs))
        except Exception as error:
            future.set_exception(error)
        return future


class OneDies(Executor):
    """Another executor whose worker is killed once, during the third task."""

    def __init__(self, inner: Executor, flag: Path) -> None:
        self.inner, self.flag, self.num_submitted = inner, flag, itertools.count()

    def submit(self, fn, /, *args, **kwargs):
        if next(self.num_submitted) == 2:
            return self.inner.submit(die_once, str(self.flag), fn, *args)
        return self.inner.submit(fn, *args)


def names_in(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


# ---- any executor


@pytest.mark.parametrize("kind", ["threads", "processes", "cluster"])
def test_every_executor_gives_the_result_of_one_process(kind, request, tmp_path, corpus, tokenizer):
    expected = Counter()
    for text in (TEXT * 3, TEXT[::-1], TEXT * 3):
        expected.update(naive_pretoken_counts(text, [END]))
    for document in TEXT.split("\n"):  # of JSON lines: special tokens in it are text
        expected.update(naive_pretoken_counts(document, []))
    alone = encode_file(tokenizer, corpus, tmp_path / "alone.bin")
    merges = train_bpe(corpus, 400, [END], kernels=False)
    with (
        dask_executor(request.getfixturevalue("scheduler") if kind == "cluster" else None) as dask,
        ThreadPoolExecutor(3) if kind == "threads" else ProcessPoolExecutor(2) as pool,
    ):
        executor = dask or pool
        for number, kernels in enumerate([False, True]):
            options: dict[str, Any] = {"executor": executor, "shard_bytes": 1000, "kernels": kernels}
            counts = count_pretokens(corpus, SPECIAL, work_folder=tmp_path / f"counts{number}", **options)
            assert counts == expected
        options: dict[str, Any] = {"executor": executor, "work_folder": tmp_path / "counts", "kernels": False}
        assert train_bpe(corpus, 400, [END], **options) == merges
        info = encode_files(tokenizer, corpus, tmp_path / "many", executor=executor, shard_bytes=1000)
    assert dataclasses.replace(info, sha256=alone.sha256) == alone
    many = open_tokens(tmp_path / "many", verify=True)
    assert np.array_equal(many, open_tokens(tmp_path / "alone.bin"))
    assert len(list((tmp_path / "many").glob("*.bin"))) > 5
    files = {"alone.bin", "alone.json"}
    assert names_in(tmp_path) == files | {"corpus", "counts0", "counts1", "counts", "many"}


def test_a_dataset_is_a_folder(tmp_path, corpus, tokenizer):
    with pytest.raises(InvalidInputError, match=r"one\.bin names one token file.*encode_file"):
        encode_files(tokenizer, corpus, tmp_path / "one.bin")
    assert not (tmp_path / "one.bin").exists()


def test_documents_of_several_json_lines_files_are_separated(tmp_path, tokenizer):
    files = {"a.jsonl": ["one", "two"], "b.jsonl.gz": ["three", "four"], "c.jsonl": ["five"]}
    for name, documents in files.items():
        lines = "\n".join(json.dumps({"text": document}) for document in documents).encode()
        (tmp_path / name).write_bytes(gzip.compress(lines) if name.endswith(".gz") else lines)
    inputs = [tmp_path / name for name in files]
    expected = tokenizer.encode(END.join(["one", "two", "three", "four", "five"]))
    encode_file(tokenizer, inputs, tmp_path / "one.bin")
    encode_files(tokenizer, inputs, tmp_path / "many", executor=Inline())
    assert open_tokens(tmp_path / "one.bin").tolist() == expected
    assert open_tokens(tmp_path / "many")[:].tolist() == expected


def test_a_killed_worker_of_a_cluster_costs_only_its_task(scheduler, tmp_path, corpus, tokenizer):
    with dask_executor(scheduler) as dask:
        assert dask is not None
        executor = OneDies(dask, tmp_path / "died")
        info = encode_files(tokenizer, corpus, tmp_path / "many", executor=executor, shard_bytes=1000)
    assert (tmp_path / "died").exists()
    assert np.array_equal(open_tokens(tmp_path / "many", verify=True), encoded(tokenizer, corpus, tmp_path))
    manifest = (tmp_path / "many" / "manifest.jsonl").read_text().splitlines()
    assert len(manifest) == 1 + next(executor.num_submitted), "no other task was submitted twice"
    assert info.count == sum(json.loads(line)["count"] for line in manifest[1:])
    assert not list((tmp_path / "many").glob("*.tmp"))


def encoded(tokenizer: Tokenizer, inputs: list[Path], folder: Path) -> np.ndarray:
    encode_file(tokenizer, inputs, folder / "alone.bin")
    return open_tokens(folder / "alone.bin")


def test_a_broken_pool_is_reported_and_another_resumes(tmp_path, corpus):
    options: dict[str, Any] = {"work_folder": tmp_path / "work", "shard_bytes": 500, "kernels": False}
    with ProcessPoolExecutor(1) as pool, pytest.raises(ChildProcessError, match=r"counts-0-000002.*run the same again"):
        count_pretokens(corpus, SPECIAL, executor=OneDies(pool, tmp_path / "died"), **options)
    executor = Inline()
    counts = count_pretokens(corpus, SPECIAL, executor=executor, **options)
    assert "counts-0-000000.words" not in executor.names
    assert "counts-0-000002.words" in executor.names
    assert counts == count_pretokens(corpus, SPECIAL, kernels=False)


def test_a_broken_pool_of_our_own_is_replaced(tmp_path, corpus):
    shards = split_into_shards(map(entire_source, expand_inputs(corpus)), 1000)
    count = partial(count_shard, ShardCounting(special_tokens=(END,)))
    names = [f"{i}.words" for i in range(len(shards))]
    with WorkFolder(tmp_path / "work", {}) as folder:
        tasks = [(name, (shard,)) for name, shard in zip(names, shards, strict=True)]
        folder.run(partial(die_once, str(tmp_path / "died"), count), tasks, partial(ProcessPoolExecutor, 2))
    assert (tmp_path / "died").exists()
    tables = [read_table(tmp_path / "work" / name) for name in names]
    merged = concatenate(list(merge_tables(tables, kernels=False)))
    assert merged.to_counter() == count_pretokens(corpus, SPECIAL, kernels=False)


def test_a_pool_that_always_breaks_is_an_error(tmp_path):
    folder = WorkFolder(tmp_path, {})
    with pytest.raises(ChildProcessError, match="a worker died during first or a later task"):
        folder.run(die, [("first", ()), ("second", ())], partial(ProcessPoolExecutor, 1))


# ---- interruption and resuming


def test_an_interrupted_encoding_is_resumed(tmp_path, corpus, tokenizer):
    many = partial(encode_files, tokenizer, corpus, tmp_path / "many", shard_bytes=1000)
    with pytest.raises(KeyboardInterrupt):
        many(executor=Inline(4))
    with pytest.raises(FileNotFoundError, match="not complete yet"):
        open_tokens(tmp_path / "many")
    done = sorted((tmp_path / "many").glob("*.bin"))
    assert len(done) == 4
    # A power cut: the last line of the manifest is incomplete, and the file before it is empty.
    manifest = tmp_path / "many" / "manifest.jsonl"
    manifest.write_bytes(manifest.read_bytes()[:-20])
    done[2].write_bytes(b"")
    executor = Inline()
    many(executor=executor)
    assert {"000000.bin", "000001.bin"}.isdisjoint(executor.names)
    assert {"000002.bin", "000003.bin", "000004.bin"} <= set(executor.names)
    tokens = open_tokens(tmp_path / "many", verify=True)
    assert np.array_equal(tokens, encoded(tokenizer, corpus, tmp_path))
    again = Inline()
    many(executor=again)
    assert again.names == []


def test_an_interrupted_count_is_resumed(tmp_path, corpus):
    """Also during the merge, when the tables of the shards are deleted."""
    expected = count_pretokens(corpus, SPECIAL, kernels=False)

    def count(folder, executor, **more):
        options: dict[str, Any] = {
            "work_folder": tmp_path / folder,
            "executor": executor,
            "shard_bytes": 500,
            "fan_in": 3,
        }
        counts = count_pretokens(corpus, SPECIAL, kernels=False, **options, **more)
        return counts, len(executor.names)

    counts, num_tasks = count("uninterrupted", Inline())
    assert counts == expected
    assert num_tasks > 20
    for done in (*range(0, num_tasks, 4), num_tasks - 1):
        with pytest.raises(KeyboardInterrupt):
            count(str(done), Inline(done))
        assert count(str(done), Inline()) == (expected, num_tasks - done)
        frequent = {pretoken: count for pretoken, count in expected.items() if count > 1}
        assert count(str(done), Inline(), min_count=2) == (frequent, 0)
        assert len(names_in(tmp_path / str(done))) == 2, "the manifest and the last table"


def test_closing_a_folder_twice_does_not_unlock_another(tmp_path):
    first = WorkFolder(tmp_path / "a", {})
    first.close()
    with WorkFolder(tmp_path / "b", {}):  # its lock may have the file descriptor of the first
        first.close()
        with pytest.raises(BlockingIOError):
            WorkFolder(tmp_path / "b", {})


def test_two_runs_cannot_use_one_folder(tmp_path, corpus, tokenizer):
    with WorkFolder(tmp_path / "many", {"kind": "any"}):
        for start_over in (False, True):
            with pytest.raises(
                BlockingIOError, match=r"many is being written by process \d+ on .*: wait until it has ended"
            ):
                encode_files(tokenizer, corpus, tmp_path / "many", start_over=start_over)
    for _ in range(2):  # an error unlocks it too
        with pytest.raises(InvalidInputError, match="holds other work"):
            encode_files(tokenizer, corpus, tmp_path / "many")
    encode_files(tokenizer, corpus, tmp_path / "many", start_over=True)
    assert np.array_equal(open_tokens(tmp_path / "many"), encoded(tokenizer, corpus, tmp_path))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork and SIGKILL")
def test_the_lock_of_a_dead_run_is_released_although_its_workers_live(tmp_path):
    reading, writing = os.pipe()
    if (run := os.fork()) == 0:
        folder = WorkFolder(tmp_path, {})
        if (worker := os.fork()) == 0:
            time.sleep(60)
        os.write(writing, str(worker).encode())
        os.kill(os.getpid(), signal.SIGKILL)
        folder.close()
    os.waitpid(run, 0)
    worker = int(os.read(reading, 20))
    try:
        WorkFolder(tmp_path, {}).close()
    finally:
        os.kill(worker, signal.SIGKILL)


def _report_and_kill_parent(writing: int) -> int:
    os.write(writing, b"%d " % os.getpid())
    os.kill(os.getppid(), signal.SIGKILL)
    return 0


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork and SIGKILL")
def test_the_workers_of_a_killed_process_end():
    reading, writing = os.pipe()
    if (run := os.fork()) == 0:
        with local_executor(2, 4, threads=False)() as executor:
            executor.submit(_report_and_kill_parent, writing).result()
        os._exit(0)
    os.waitpid(run, 0)
    os.close(writing)
    # All of the pipe's writers have ended when it is at its end. A worker that waits forever would keep it open.
    assert select.select([reading], [], [], 30)[0]
    assert os.read(reading, 20).endswith(b" ")
    ended = select.select([reading], [], [], 30)[0]
    os.close(reading)
    assert ended


def test_other_work_is_refused_and_can_be_started_over(tmp_path, corpus):
    folder = tmp_path / "work"
    corpus = corpus[:3]
    first = count_pretokens(corpus, SPECIAL, work_folder=folder, kernels=False)
    with pytest.raises(InvalidInputError, match=r"holds other work, with other inputs, .*--start-over"):
        count_pretokens(corpus[:2], SPECIAL, work_folder=folder, kernels=False)
    with pytest.raises(InvalidInputError, match="with other special tokens;"):
        count_pretokens(corpus, SpecialTokens([]), work_folder=folder, kernels=False)
    with pytest.raises(InvalidInputError, match="with other pattern;"):
        count_pretokens(corpus, SPECIAL, pattern=r"\w+|\W", work_folder=folder)
    os.utime(corpus[0], ns=(1, 1))
    with pytest.raises(InvalidInputError, match="with other input_sha256;"):
        count_pretokens(corpus, SPECIAL, work_folder=folder, kernels=False)
    assert count_pretokens(corpus, SPECIAL, work_folder=folder, start_over=True, kernels=False) == first


def flip_a_bit(path: Path, offset: int = -1) -> None:
    content = bytearray(path.read_bytes())
    content[offset] ^= 1
    path.write_bytes(content)


def test_a_changed_table_is_made_again(tmp_path, corpus):
    options: dict[str, Any] = {"work_folder": tmp_path / "work", "kernels": False, "shard_bytes": 1000}
    expected = count_pretokens(corpus, SPECIAL, **options)
    (table,) = (tmp_path / "work").glob("*.words")
    flip_a_bit(table)
    assert count_pretokens(corpus, SPECIAL, **options) == expected
    with pytest.raises(KeyboardInterrupt):
        count_pretokens(corpus, SPECIAL, start_over=True, **options, executor=Inline(5))
    flip_a_bit(tmp_path / "work" / "counts-0-000002.words")
    executor = Inline()
    assert count_pretokens(corpus, SPECIAL, **options, executor=executor) == expected
    assert executor.names[0] == "counts-0-000002.words"
    flip_a_bit(table)
    with pytest.raises(DamagedFileError, match="has changed since it was written; run again"):
        list(read_table(table, sha256="0"))


@pytest.mark.parametrize("damaged", ["000001.bin", "000001.json", "no sidecar"])
@pytest.mark.parametrize("complete", [False, True])
def test_a_changed_token_file_is_made_again_before_an_index_is_written(tmp_path, corpus, tokenizer, damaged, complete):
    many = partial(encode_files, tokenizer, corpus, tmp_path / "many", shard_bytes=1000)
    if complete:
        many()
    else:
        with pytest.raises(KeyboardInterrupt):
            many(executor=Inline(4))
    if damaged == "no sidecar":
        (tmp_path / "many" / "000001.json").unlink()
    else:
        flip_a_bit(tmp_path / "many" / damaged, 40)
    executor = Inline()
    many(executor=executor)
    assert executor.names[0] == "000001.bin"
    assert len(executor.names) == 1 or not complete
    tokens = open_tokens(tmp_path / "many", verify=True)
    assert np.array_equal(tokens, encoded(tokenizer, corpus, tmp_path))


MANIFEST_DAMAGE = {
    "a number": b"5",
    "deep": b"[" * 100_000,
    "another file": b'{"file": "../precious.bin", "bytes": 1, "file_bytes": 1, "sha256": ""}',
    "all files": b'{"file": "*.bin", "bytes": 1, "file_bytes": 1, "sha256": ""}',
    "a file that is no name": b'{"file": 5, "bytes": 1, "file_bytes": 1, "sha256": ""}',
    "no size": b'{"file": "000001.bin"}',
    "a size of another kind": b'{"file": "000001.bin", "bytes": "1", "file_bytes": [], "sha256": ""}',
    "a checksum of another kind": b'{"file": "000001.bin", "bytes": 1, "file_bytes": 1, "sha256": 1}',
}


@pytest.mark.parametrize("line", MANIFEST_DAMAGE.values(), ids=MANIFEST_DAMAGE)
@pytest.mark.parametrize("start_over", [False, True])
def test_a_line_of_a_manifest_that_is_no_record_is_ignored(tmp_path, corpus, tokenizer, line, start_over):
    folder = tmp_path / "many"
    many = partial(encode_files, tokenizer, corpus, folder, shard_bytes=1000)
    many()
    for precious in (tmp_path / "precious.bin", folder / "precious.bin"):
        precious.write_bytes(b"my only copy")
    lines = (folder / "manifest.jsonl").read_bytes().splitlines()
    (folder / "manifest.jsonl").write_bytes(b"\n".join([lines[0], line, *lines[3:]]))
    executor = Inline()
    many(executor=executor, start_over=start_over)
    assert start_over or executor.names == sorted(json.loads(line)["file"] for line in lines[1:3])
    assert np.array_equal(open_tokens(folder, verify=True), encoded(tokenizer, corpus, tmp_path))
    assert (tmp_path / "precious.bin").read_bytes() == (folder / "precious.bin").read_bytes() == b"my only copy"


@pytest.mark.parametrize("executor", [None, Inline])
def test_the_first_of_several_errors_is_raised(tmp_path, executor):
    path = tmp_path / "text.txt"
    path.write_bytes(b"word " * 300 + b"\xff" + b" word" * 300 + b"\xff" + b" word" * 300)
    options: dict[str, Any] = {"shard_bytes": 100, "executor": executor and executor(), "num_workers": 3}
    for kernels in (False, True):
        with pytest.raises(InvalidInputError, match="at byte offset 1500 "):
            count_pretokens(path, SPECIAL, kernels=kernels, work_folder=tmp_path / str(kernels), **options)


# ---- datasets of several files


@pytest.fixture
def dataset(tmp_path, corpus, tokenizer) -> tuple[Path, np.ndarray]:
    encode_files(tokenizer, corpus, tmp_path / "many", shard_bytes=700)
    return tmp_path / "many", encoded(tokenizer, corpus, tmp_path)


def test_incomplete_and_changed_files_are_detected(dataset, tokenizer, corpus):
    folder, tokens = dataset
    path = folder / "000003.bin"
    content = path.read_bytes()
    path.write_bytes(content[:-2])
    with pytest.raises(DamagedFileError, match=rf"000003.bin has {len(content) - 2} bytes, but .*index.json says"):
        open_tokens(folder)
    path.unlink()
    with pytest.raises(DamagedFileError, match=r"000003.bin is missing"):
        open_tokens(folder)
    path.write_bytes(bytes(len(content)))
    assert len(open_tokens(folder)) == len(tokens)
    with pytest.raises(DamagedFileError, match=r"000003.bin has the SHA-256 "):
        open_tokens(folder, verify=True)
    encode_files(tokenizer, corpus, folder, shard_bytes=700)
    assert np.array_equal(open_tokens(folder / "index.json", verify=True), tokens)


def test_files_that_are_not_an_index(tmp_path, dataset):
    folder, _ = dataset
    with pytest.raises(DamagedFileError, match="is not the index of a token dataset"):
        open_tokens(folder / "000000.json")
    with pytest.raises(InvalidInputError, match=r"dtype=uint32 was given, but .* says uint16"):
        open_tokens(folder, dtype=np.uint32)
    with pytest.raises(FileNotFoundError, match="the folder is not a token dataset"):
        open_tokens(tmp_path)


INDEX_DAMAGE = {
    "deep": lambda index: b'{"shards":' * 100_000,
    "a list": lambda index: [index],
    "no shards": lambda index: {**index, "shards": 5},
    "a shard that is no object": lambda index: {**index, "shards": [5]},
    "a shard without a file": lambda index: {**index, "shards": [{**index["shards"][0], "file": None}]},
    "a shard with a count of another kind": lambda index: {**index, "shards": [{**index["shards"][0], "count": True}]},
    "a negative count": lambda index: {
        **index,
        "count": 0,
        "shards": [{"file": "a", "count": 1, "sha256": ""}, {"file": "a", "count": -1, "sha256": ""}],
    },
    "another fingerprint": lambda index: {**index, "tokenizer_fingerprint": "0" * 64},
    "another order": lambda index: {**index, "shards": index["shards"][::-1]},
}


@pytest.mark.parametrize("damage", INDEX_DAMAGE.values(), ids=INDEX_DAMAGE)
def test_a_damaged_index_is_refused_in_one_line(dataset, tokenizer, corpus, damage):
    folder, tokens = dataset
    index = json.loads((folder / "index.json").read_bytes())
    content = damage(index)
    (folder / "index.json").write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    with pytest.raises(DamagedFileError, match=r"index\.json is not the index of a token dataset, or is damaged"):
        open_tokens(folder)
    encode_files(tokenizer, corpus, folder, shard_bytes=700)
    assert np.array_equal(open_tokens(folder, verify=True), tokens)


def test_several_files_are_read_like_one_array(dataset):
    folder, tokens = dataset
    many = open_tokens(folder)
    assert (len(many), many.ndim, many.dtype, many.shape) == (len(tokens), 1, tokens.dtype, tokens.shape)
    rng = np.random.default_rng(0)
    for _ in range(300):
        start, stop = rng.integers(-len(tokens) - 5, len(tokens) + 5, 2)
        step = rng.choice([1, 1, 2, -3])
        assert np.array_equal(many[start:stop:step], tokens[start:stop:step])
        shape = tuple(rng.integers(0, 9, rng.integers(0, 3)))
        indices = rng.integers(-len(tokens), len(tokens), shape)
        assert np.array_equal(many[indices], tokens[indices])
    assert (many[0], many[-1]) == (tokens[0], tokens[-1])
    assert np.array_equal(many[:], tokens)
    for wrong in (len(tokens), -len(tokens) - 1, np.array([0, len(tokens)])):
        with pytest.raises(IndexError, match="outside"):
            many[wrong]


def test_batches_are_those_of_the_single_file(dataset, tokenizer):
    from basic.training.batches import BatchSampler, check_token_ids, document_starts

    folder, tokens = dataset
    many, separator_id = open_tokens(folder), tokenizer.special_token_ids[END]
    starts = document_starts(tokens, separator_id, 64)
    assert np.array_equal(document_starts(many, separator_id, 64), starts)
    cases: list[dict[str, Any]] = [{}, {"starts": starts}, {"shuffled": True}]
    for options in cases:
        one, other = (BatchSampler(ids, 16, 64, seed=1, vocab_size=400, **options) for ids in (tokens, many))
        for step in range(4):
            for x, y in zip(one.batch(step), other.batch(step), strict=True):
                assert (x == y).all()
    with pytest.raises(ValueError, match=r"index.json has token ids up to"):
        check_token_ids(many, 100)


# ---- count tables


COUNTS = st.dictionaries(
    st.builds(
        bytes.__add__,
        st.sampled_from([b"", b"abcdefg", b"abcdefgh", b"abcdefghijklmnop", b"a\0", b"\xff" * 8]),
        st.binary(min_size=1, max_size=3),
    ),
    st.integers(1, 1 << 40),
    max_size=12,
)


@settings(max_examples=40)
@given(tables=st.lists(COUNTS, max_size=7), block_pretokens=st.integers(1, 5), fan_in=st.integers(2, 4))
def test_tables_are_merged(tmp_path_factory, tables, block_pretokens, fan_in):
    folder = tmp_path_factory.getbasetemp()
    expected = sum((Counter(table) for table in tables), Counter())
    for i, table in enumerate(tables):
        blocks = [sorted_table(Counter(table))] if table else []
        write_table(folder / f"{i}.words", blocks, block_pretokens=block_pretokens)
    for kernels in (False, True):
        stored = [read_table(folder / f"{i}.words") for i in range(len(tables))]
        merged = concatenate(list(merge_tables(stored, kernels=kernels, fan_in=fan_in)))
        assert list(merged.to_counter().items()) == sorted(expected.items())


def test_unsorted_pretokens_are_sorted():
    rng = np.random.default_rng(0)
    for alphabet in (b"ab", bytes(range(256))):
        words = [bytes(rng.choice(list(alphabet), rng.integers(1, 30))) for _ in range(3000)]
        words += [b"x" * length for length in range(1, 200)]
        lengths = np.cumsum([0, *map(len, words)])
        table = PretokenCounts(np.frombuffer(b"".join(words), np.uint8), lengths, np.ones(len(words), np.int64))
        assert list(compiled.sort_pretokens(table).to_counter().items()) == sorted(Counter(words).items())


def test_memory_does_not_grow_with_the_tables(tmp_path):
    """The tables have 5 MB, in blocks of 20 kB."""
    for number in range(4):
        counts = Counter({b"%07d" % i: 1 for i in range(number, 200_000, 4)})
        write_table(tmp_path / str(number), [sorted_table(counts)], block_pretokens=1000)
    loading.load_kernels("training")
    tracemalloc.start()
    merged = merge_tables([read_table(tmp_path / str(i)) for i in range(4)], kernels=True)
    record = write_table(tmp_path / "all", merged, block_pretokens=1000)
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert (record["words"], record["count"]) == (200_000, 200_000)
    assert peak_bytes < 1_000_000


@pytest.mark.parametrize("kernels", [False, True])
def test_a_shard_with_many_distinct_pretokens_is_counted_in_several_tables(tmp_path, kernels):
    """A long stream is such a shard."""
    text = " ".join(f"{number * 7919 % 2500:x}" for number in range(5000))
    (tmp_path / "text.gz").write_bytes(gzip.compress(text.encode()))
    counting = ShardCounting(special_tokens=(END,), kernels=kernels, num_threads=2, chunk_bytes=2000, max_pretokens=300)
    (tmp_path / "work").mkdir()
    count_shard(counting, (entire_source(TextSource(tmp_path / "text.gz")),), str(tmp_path / "work" / "table"))
    table = concatenate(list(read_table(tmp_path / "work" / "table")))
    assert list(table.to_counter().items()) == sorted(naive_pretoken_counts(text, [END]).items())
    assert names_in(tmp_path / "work") == {"table"}


def test_too_many_distinct_pretokens_to_train_on():
    with pytest.raises(InvalidInputError, match=r"distinct pre-tokens .* are too many .*min_count=2"):
        arrays_for_kernels(count_pretokens(SAMPLE, SPECIAL), kernels=True, max_symbols=100)
    assert len(train_bpe(SAMPLE, 300, [END], kernels=True, min_count=3)[1]) == 36


# ---- inputs


def test_shards_are_bounded_and_small_inputs_share_one(tmp_path):
    for name, size in (("a", 10), ("b", 25), ("c", 3), ("d", 4), ("e.txt.gz", 90)):
        (tmp_path / name).write_bytes(b"x" * size)
    sources = expand_inputs([tmp_path / name for name in ("a", "b", "c", "d", "e.txt.gz", "a")])
    shards = split_into_shards(map(entire_source, sources), 10)
    sizes = [[segment.num_bytes for segment in shard] for shard in shards]
    assert sizes == [[10], [10], [10], [5, 3], [4], [90], [10]]


def test_globs_are_sorted_and_an_empty_one_is_an_error(tmp_path, monkeypatch):
    for name in ("b.txt", "a.txt", "c[1].txt", "deep/d.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    monkeypatch.chdir(tmp_path)

    def names(*inputs):
        return [os.fspath(source) for source in expand_inputs(inputs)]

    assert names("*.txt", "a.txt") == ["a.txt", "b.txt", "c[1].txt", "a.txt"]
    assert names("c[1].txt") == ["c[1].txt"]
    assert names("**/*.txt")[-1] == "deep/d.txt"
    with_field = expand_inputs(TextSource("[ab].txt", field="body"))
    assert [(source.path, source.field) for source in with_field] == [("a.txt", "body"), ("b.txt", "body")]
    with pytest.raises(FileNotFoundError, match=r"no file matches 'x\*\.txt'"):
        count_pretokens("x*.txt", SPECIAL)
    with pytest.raises(InvalidInputError, match="there is no input"):
        count_pretokens([], SPECIAL)


def test_urls_are_read_like_files(tmp_path, monkeypatch, corpus, tokenizer):
    import fsspec

    memory = fsspec.filesystem("memory")
    for path in set(corpus):
        memory.pipe_file(f"/corpus/{path.name}", path.read_bytes())
    urls = [TextSource(f"memory://corpus/{path.name}", block_bytes=500) for path in corpus]
    expected = encoded(tokenizer, corpus, tmp_path)
    for kernels in (False, True):
        counts = count_pretokens(urls, SPECIAL, shard_bytes=1000, kernels=kernels, num_workers=2)
        assert counts == count_pretokens(corpus, SPECIAL, kernels=False)
        fast = Tokenizer(tokenizer.vocab, tokenizer.merges, [END], kernels=kernels)
        folder = tmp_path / f"remote{kernels}"
        encode_files(fast, urls, folder, shard_bytes=1000, num_workers=1)
        assert np.array_equal(open_tokens(folder), expected)
    assert [os.fspath(source) for source in expand_inputs("memory://corpus/*.txt")] == [
        *("memory:///corpus/empty.txt", "memory:///corpus/plain.txt")
    ]
    (local,) = expand_inputs(corpus[0].as_uri())
    assert local.size_and_version()[0] == corpus[0].stat().st_size
    with pytest.raises(FileNotFoundError, match=r"there is no file 'memory://corpus/none\.txt'"):
        count_pretokens("memory://corpus/none.txt", SPECIAL)
    with pytest.raises(FileNotFoundError, match=r"no file matches"):
        count_pretokens("memory://corpus/none*.txt", SPECIAL)
    with pytest.raises(InvalidInputError, match="'nonsense://x' is a URL that cannot be opened here"):
        count_pretokens("nonsense://x", SPECIAL)
    memory.pipe_file("/corpus/wrong.txt", b"word " * 500 + b"\xff")
    with pytest.raises(ValueError, match=r"wrong\.txt' is not valid UTF-8 at byte offset 2500 "):
        count_pretokens("memory://corpus/wrong.txt", SPECIAL, shard_bytes=300, kernels=False)
    monkeypatch.setitem(sys.modules, "fsspec.core", None)
    monkeypatch.setitem(sys.modules, "fsspec", None)
    with pytest.raises(InvalidInputError, match="needs fsspec, which is not installed; use `uv run --extra dist "):
        count_pretokens("memory://corpus/plain.txt", SPECIAL)


class _Handler(SimpleHTTPRequestHandler):
    """Python's server, which always sends the complete file, or a server that sends the requested range."""

    supports_ranges = False

    def do_GET(self):
        requested = self.headers.get("Range") if self.supports_ranges else None
        if requested is None:
            return super().do_GET()
        content = Path(self.translate_path(self.path)).read_bytes()
        first, last = map(int, requested.removeprefix("bytes=").split("-"))
        body = content[first : last + 1]
        self.send_response(206)
        self.send_header("Content-Range", f"bytes {first}-{first + len(body) - 1}/{len(content)}")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format, *args):
        pass


@pytest.mark.parametrize("supports_ranges", [False, True])
def test_web_servers_with_and_without_ranges(tmp_path, corpus, tokenizer, supports_ranges):
    handler = type("Handler", (_Handler,), {"supports_ranges": supports_ranges})
    served = [path for path in corpus if path.stat().st_size]
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(handler, directory=corpus[0].parent)) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        try:
            base = f"http://127.0.0.1:{server.server_port}"
            urls = [TextSource(f"{base}/{path.name}", block_bytes=500) for path in served]
            assert [source.supports_ranges() for source in urls] == [supports_ranges] * len(urls)
            sizes, versions = zip(*(source.size_and_version() for source in urls), strict=True)
            assert list(sizes) == [path.stat().st_size for path in served]
            os.utime(served[0], (1, 1))
            changed = [source.size_and_version()[1] != old for source, old in zip(urls, versions, strict=True)]
            assert changed == [path == served[0] for path in served]
            counts = count_pretokens(urls, SPECIAL, shard_bytes=1000, kernels=False, num_workers=2)
            assert counts == count_pretokens(served, SPECIAL, kernels=False)
            encode_files(tokenizer, urls, tmp_path / "remote", shard_bytes=1000, num_workers=1)
            assert np.array_equal(open_tokens(tmp_path / "remote"), encoded(tokenizer, served, tmp_path))
            with pytest.raises(FileNotFoundError, match=r"there is no file 'http://.*/none\.txt'"):
                count_pretokens(f"{base}/none.txt", SPECIAL)
        finally:
            server.shutdown()


def test_the_scripts_use_a_cluster(scheduler, tmp_path, monkeypatch, corpus):
    run_script(monkeypatch, "train_bpe", *corpus, "--vocab-size", "400", "--output", tmp_path / "alone")
    options = ["--vocab-size", "400", "--output", tmp_path / "tokenizer", "--scheduler", scheduler]
    run_script(monkeypatch, "train_bpe", *corpus, *options)
    tokenizer = Tokenizer.load(tmp_path / "tokenizer")
    assert tokenizer.fingerprint == Tokenizer.load(tmp_path / "alone").fingerprint
    options = ["--tokenizer", tmp_path / "tokenizer", "--scheduler", scheduler, "--shard-bytes", "1000"]
    run_script(monkeypatch, "encode", *corpus, tmp_path / "many", *options)
    assert np.array_equal(open_tokens(tmp_path / "many"), encoded(tokenizer, corpus, tmp_path))
