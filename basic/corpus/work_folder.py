"""A work folder: tasks that each run once on any executor, and whose results are kept, so that work can resume.

The folder holds `manifest.jsonl` and one file for each finished task. The first line of the manifest describes the
work; a run that asks for other work is refused. Each further line records a finished task with the size and checksum of
its file. Lines are only appended, so the cost of a million tasks stays linear. A process that dies while it appends
leaves an incomplete line, which is ignored.

A task is a function of a few small arguments that writes a file, first under a temporary name. So it may run again, or
twice at the same time, and any `concurrent.futures.Executor` can run it: threads, processes, or a cluster.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import shutil
import threading
from collections.abc import Callable, Generator, Iterable, Sequence
from concurrent.futures import BrokenExecutor, CancelledError, Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from itertools import islice
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from basic.common.errors import InvalidInputError, how_to_install
from basic.common.files import difference_from_object, make_folder, open_file, read_file, sha256_of_file, write_json
from basic.common.folder_lock import FolderLock

MANIFEST_NAME = "manifest.jsonl"
# Of atomic_write, of count tables, and of the folders in which tables are made.
_TEMPORARY_NAME = re.compile(r".*\.(\w+-\d+-)?[0-9a-f]{8}\.tmp|tmp\w{8}\.tmp")
_VERSION = 1  # of the files that tasks write; another version is other work
_MAX_LINE_BYTES = 1 << 20
_MIN_TASKS_FOR_PROCESSES = 4
_MAX_SUBMITTED_TASKS = 1000  # at a time: enough for any cluster
_DASK_LOST_WORKER = ("KilledWorker", "NoValidWorkerError", "FutureCancelledError")
_MAX_BROKEN_POOLS = 3  # in a row, without a finished task

Record = dict[str, Any]
Task = tuple[str, tuple]  # the name of its file, and the arguments of the function


def local_executor(num_workers: int, num_tasks: int, *, threads: bool) -> Callable[[], Executor]:
    """Return a constructor of an executor for this machine.

    Args:
        threads: whether the tasks run in parallel in threads, as kernels do. Other tasks run in processes, unless
            there are too few of them to start processes for.
    """
    if not threads and num_workers > 1 and num_tasks >= _MIN_TASKS_FOR_PROCESSES:
        return partial(ProcessPoolExecutor, min(num_workers, num_tasks), initializer=_end_with_parent)
    return partial(ThreadPoolExecutor, num_workers)


def _end_with_parent() -> None:
    """In a worker process: end when the parent does, also if it is killed; otherwise the worker would wait forever."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def wait_and_end() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=wait_and_end, daemon=True).start()


@contextmanager
def dask_executor(scheduler: str | None) -> Generator[Executor | None]:
    """Connect to a Dask cluster and yield its executor; None if no scheduler is given.

    Args:
        scheduler: the address of the scheduler, such as tcp://10.0.0.1:8786.

    Raises:
        InvalidInputError: Dask is not installed, or the address is invalid.
        OSError: the scheduler does not answer.
    """
    if scheduler is None:
        yield None
        return
    try:
        from distributed import Client
        from distributed.comm.addressing import get_address_host_port
    except ImportError:
        install = how_to_install("dist", "distributed fsspec aiohttp")
        raise InvalidInputError(f"a cluster needs Dask, which is not installed; {install}") from None
    try:
        get_address_host_port(scheduler)  # at the end of a Client that fails at this, a process waits for a minute
        client = Client(scheduler, set_as_default=False)
    except ValueError as error:
        raise InvalidInputError(f"{scheduler!r} is not an address such as tcp://10.0.0.1:8786: {error}") from error
    with client:
        yield client.get_executor(pure=False)


def is_work_folder(folder: str | os.PathLike) -> bool:
    """Whether a folder has the manifest of a work folder, which may be empty."""
    try:
        with open_file(Path(folder) / MANIFEST_NAME) as file:
            line = file.readline(_MAX_LINE_BYTES)
        return not line or isinstance(json.loads(line)["work"], dict)
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return False


def _is_record(line: Any) -> bool:
    types = {"file": str, "file_bytes": int, "sha256": str}
    if difference_from_object(line, types) is not None or Path(line["file"]).name != line["file"]:
        return False
    return isinstance(line.get("bytes", 0), int)  # merged tables have none


class WorkFolder:
    """A folder of work, locked for this run until it is closed (`with` closes it) or the process ends.

    Args:
        path: created if it does not exist. All workers must see it under this path.
        work: describes the work, as JSON values.
        start_over: delete the results that the folder holds, also those of other work.

    Raises:
        InvalidInputError: the folder holds other work.
        FileExistsError: the folder has a manifest.jsonl that is not of a work folder.
        BlockingIOError: another process uses the folder.
    """

    def __init__(self, path: str | os.PathLike, work: dict[str, Any], *, start_over: bool = False) -> None:
        self.path = Path(path).resolve()
        make_folder(self.path)
        self._manifest = self.path / MANIFEST_NAME
        self._cancelled = threading.Event()
        self._verified: set[str] = set()  # names of files that are as their records say
        # A second run would remove the temporary files of the first.
        self._lock = FolderLock(self.path)
        try:
            self._records = self._open(work, start_over)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> WorkFolder:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Release the lock."""
        self._lock.close()

    def _open(self, work: dict[str, Any], start_over: bool) -> dict[str, Record]:
        """Check or create the manifest; return the records of finished tasks, by file name."""
        work = json.loads(json.dumps({"version": _VERSION, **work}))
        if self._manifest.exists() and not is_work_folder(self.path):
            raise FileExistsError(
                f"{str(self._manifest)!r} exists and is not the manifest of a work folder; give another folder"
            )
        if start_over:
            self._delete_results()
        lines = self._read_manifest()
        if not lines:
            write_json(self._manifest, {"work": work})
        elif (existing := lines[0].get("work")) != work:
            existing = existing if isinstance(existing, dict) else {}
            differing = [key for key in work if existing.get(key) != work[key]] or sorted(set(existing) - set(work))
            raise InvalidInputError(
                f"{self.path} holds other work, with other {', '.join(differing)}; give another folder, or delete what "
                "it holds with start_over=True (--start-over)"
            )
        return {line["file"]: line for line in lines[1:] if _is_record(line)}

    def finished_record(self, name: str) -> Record | None:
        """Return the record of a finished task, or None if its file is missing or is no longer as it was written.

        Other files are made from this one, and get new checksums. So a file of an earlier process is compared with its
        own checksum first, once.
        """
        record = self._records.get(name)
        path = self.path / name
        if record is None or not path.is_file() or path.stat().st_size != record["file_bytes"]:
            return None
        if name not in self._verified:
            if sha256_of_file(path) != record["sha256"]:
                self.discard(name)
                return None
            self._verified.add(name)
        return record

    def discard(self, name: str) -> None:
        """Forget that a task is finished, so that it runs again."""
        self._records.pop(name, None)

    def bytes_done(self, names: Iterable[str]) -> int:
        """Return how many bytes of text the finished tasks among these names have processed."""
        return sum(record.get("bytes", 0) for record in map(self.finished_record, names) if record is not None)

    def records(self, names: Iterable[str]) -> list[Record]:
        """Return the records of the finished tasks among these names, also if their files have been merged."""
        return [self._records[name] for name in names if name in self._records]

    def run(
        self,
        function: Callable[..., Record],
        tasks: Iterable[Task],
        executor: Executor | Callable[[], Executor],
        on_finished: Callable[[Record], object] | None = None,
    ) -> None:
        """Run the tasks that are not finished.

        Args:
            function: called with the arguments of a task and the path of its file; returns the record to keep.
            executor: an executor, or a constructor of one. An executor of ours whose processes break is replaced.
            on_finished: called with the record of each task that this call has run.

        Raises:
            ChildProcessError: workers died; the message names the task. Finished tasks are kept.
            Exception: raised by a task; of several the first in the order of the tasks.
        """
        remaining = [task for task in tasks if self.finished_record(task[0]) is None]
        if isinstance(executor, Executor):
            self._run(function, remaining, executor, on_finished)
            return
        num_broken = 0
        while remaining:
            num_before = len(remaining)
            try:
                with executor() as pool:
                    self._run(function, remaining, pool, on_finished)
            except ChildProcessError:
                remaining = [task for task in remaining if self.finished_record(task[0]) is None]
                num_broken = 0 if len(remaining) < num_before else num_broken + 1
                if num_broken == _MAX_BROKEN_POOLS:
                    raise
            else:
                return

    def cancellable(self, advance: Callable[[int], object]) -> Callable[[int], object]:
        """Return the same function, but it raises InterruptedError, and so ends its thread, once a run has failed."""

        def advance_or_stop(amount: int) -> None:
            if self._cancelled.is_set():
                raise InterruptedError("the run has ended early")
            advance(amount)

        return advance_or_stop

    def remove_temporary_files(self) -> None:
        """Remove the files that dead workers have left."""
        for path in self.path.glob("*.tmp"):
            if _TEMPORARY_NAME.fullmatch(path.name) is None:  # somebody's
                continue
            shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)

    def _run(
        self,
        function: Callable[..., Record],
        tasks: Sequence[Task],
        executor: Executor,
        on_finished: Callable[[Record], object] | None,
    ) -> None:
        submitted: dict[Future, int] = {}  # to the index of its task
        completed: SimpleQueue[Future] = SimpleQueue()
        waiting = iter(enumerate(tasks))
        first_failed, error = len(tasks), None
        try:
            while True:
                for index, (name, arguments) in islice(waiting, 0 if error else _MAX_SUBMITTED_TASKS - len(submitted)):
                    try:
                        future = executor.submit(function, *arguments, str(self.path / name))
                    except BrokenExecutor as problem:
                        first_failed, error = index, problem
                        break
                    submitted[future] = index
                    future.add_done_callback(completed.put)
                # After a failure, wait only for the tasks before it: one of these may fail too.
                if not any(index < first_failed for index in submitted.values()):
                    break
                index = submitted.pop(future := completed.get())
                try:
                    record = self._append_record(tasks[index][0], future.result())
                except (Exception, CancelledError) as problem:
                    if index < first_failed:
                        first_failed, error = index, problem
                        for later in [later for later, later_index in submitted.items() if later_index > index]:
                            later.cancel()
                else:
                    if on_finished is not None:
                        on_finished(record)
        finally:
            if submitted:
                self._cancelled.set()
            # Keep what is finished, also after Ctrl-C.
            for future, index in submitted.items():
                if not future.cancel() and future.done() and future.exception() is None:
                    self._append_record(tasks[index][0], future.result())
        if isinstance(error, BrokenExecutor | CancelledError) or type(error).__name__ in _DASK_LOST_WORKER:
            raise ChildProcessError(
                f"a worker died during {tasks[first_failed][0]} or a later task (killed, or out of memory?): "
                f"{error!r:.200}. Finished tasks are kept in {self.path}: run the same again to resume"
            ) from error
        if error is not None:
            raise error

    def _append_record(self, name: str, record: Record) -> Record:
        path = self.path / name
        if not path.is_file():
            raise FileNotFoundError(
                f"a worker has written {str(path)!r}, but the file is not visible here: the folder must be on a file "
                "system that all workers share"
            )
        self._records[name] = record = {"file": name, **record}
        self._verified.add(name)
        with open(self._manifest, "a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
        return record

    def _read_manifest(self) -> list[dict[str, Any]]:
        """Read the lines of the manifest; end an incomplete one, so that the next record begins on a line of its own.

        An invalid line becomes an empty dictionary.
        """
        if not self._manifest.is_file():
            return []
        content = read_file(self._manifest)
        if content and not content.endswith(b"\n"):
            with open(self._manifest, "ab") as file:
                file.write(b"\n")
        lines = []
        for line in content.splitlines():
            try:
                lines.append(json.loads(line))
            except (ValueError, RecursionError):
                lines.append({})
        return lines

    def _delete_results(self) -> None:
        for line in self._read_manifest():
            if _is_record(line):
                path = self.path / Path(line["file"]).name
                path.unlink(missing_ok=True)
                if path.suffix == ".bin":
                    for suffix in (".json", ".mask"):  # the sidecar and the mask of a token file
                        path.with_suffix(suffix).unlink(missing_ok=True)
        self._manifest.unlink(missing_ok=True)
