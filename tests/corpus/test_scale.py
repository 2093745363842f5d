"""Text of any size: every executor gives the result of one process, and finished tasks survive a crash."""

import dataclasses
import gzip
import itertools
import json
import os
import select
import signal
import time
from collections import Counter
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import dask
import numpy as np
import pytest
from distributed import LocalCluster

from basic.common.errors import DamagedFileError, InvalidInputError
from basic.corpus.count_tables import concatenate, merge_tables, read_table
from basic.corpus.counting import ShardCounting, count_pretokens, count_shard
from basic.corpus.shards import entire_source, split_into_shards
from basic.corpus.sources import expand_inputs
from basic.corpus.work_folder import WorkFolder, dask_executor, local_executor
from basic.encoding import encode_file, encode_files
from basic.pretokenization import SpecialTokens
from basic.Tokenizer import Tokenizer
from basic.tokens.opening import open_tokens
from basic.train_bpe import train_bpe
from tests.fixtures.make_tokenizer_fixtures import naive_pretoken_counts
from tests.helpers.corpus_tools import END, SPECIAL, TEXT, Inline, encoded, flip_a_bit, names_in
from tests.helpers.dying_worker import die, die_once
from tests.helpers.scripts import run_script


@pytest.fixture(scope="module")
def scheduler():
    """The address of a cluster of two processes; if both stay dead, there is an error."""
    with (
        dask.config.set({"distributed.scheduler.no-workers-timeout": "60s"}),
        LocalCluster(n_workers=2, threads_per_worker=1, processes=True, dashboard_address=":0") as local,
    ):
        yield local.scheduler_address


class OneDies(Executor):
    """Another executor whose worker is killed once, during the third task."""

    def __init__(self, inner: Executor, flag: Path) -> None:
        self.inner, self.flag, self.num_submitted = inner, flag, itertools.count()

    def submit(self, fn, /, *args, **kwargs):
        if next(self.num_submitted) == 2:
            return self.inner.submit(die_once, str(self.flag), fn, *args)
        return self.inner.submit(fn, *args)


# --- any executor ---------------------------------------------------------------------------------------------


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


@pytest.mark.parametrize("address", ["nonsense", "tcp://10.0.0.1", "other://10.0.0.1:8786"])
def test_no_client_is_made_for_what_is_no_address(address, monkeypatch):
    monkeypatch.setattr("distributed.Client", pytest.fail)
    with pytest.raises(InvalidInputError, match="is not an address such as"), dask_executor(address):
        pass


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


def test_the_scripts_use_a_cluster(scheduler, tmp_path, monkeypatch, corpus):
    run_script(monkeypatch, "train_bpe", *corpus, "--vocab-size", "400", "--output", tmp_path / "alone")
    options = ["--vocab-size", "400", "--output", tmp_path / "tokenizer", "--scheduler", scheduler]
    run_script(monkeypatch, "train_bpe", *corpus, *options)
    tokenizer = Tokenizer.load(tmp_path / "tokenizer")
    assert tokenizer.fingerprint == Tokenizer.load(tmp_path / "alone").fingerprint
    options = ["--tokenizer", tmp_path / "tokenizer", "--scheduler", scheduler, "--shard-bytes", "1000"]
    run_script(monkeypatch, "encode", *corpus, tmp_path / "many", *options)
    assert np.array_equal(open_tokens(tmp_path / "many"), encoded(tokenizer, corpus, tmp_path))


# --- interruption and resuming --------------------------------------------------------------------------------


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
    with pytest.raises(InvalidInputError, match="with other pattern, shard boundaries;"):
        count_pretokens(corpus, SPECIAL, pattern=r"\w+|\W", work_folder=folder)
    os.utime(corpus[0], ns=(1, 1))
    with pytest.raises(InvalidInputError, match="with other input_sha256;"):
        count_pretokens(corpus, SPECIAL, work_folder=folder, kernels=False)
    assert count_pretokens(corpus, SPECIAL, work_folder=folder, start_over=True, kernels=False) == first


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
