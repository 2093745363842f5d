"""Work that is done in parts, each of them once: on any executor, kept in a folder, taken up again where it was.

A folder of work holds `manifest.jsonl` and a file for each part. The manifest's first line says what the work is: a
run that wants other work is refused. Each further line is a part that is done, with its sums and checksum. Lines are
only ever added, so that a million of them cost what they should; whoever dies while adding one leaves half a line,
which is passed over.

A part is a function of a few small arguments that writes a file, under a temporary name first. So it may be run again,
or twice at a time, and what runs it may be any `concurrent.futures.Executor`: threads, processes, or a cluster, whose
scheduling is its own business.
"""

from __future__ import annotations

import json
import os
import shutil
import threading
from collections.abc import Callable, Generator, Iterable, Sequence
from concurrent.futures import BrokenExecutor, CancelledError, Executor, Future
from contextlib import contextmanager, suppress
from itertools import islice
from pathlib import Path
from queue import SimpleQueue
from typing import Any

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

_MANIFEST = "manifest.jsonl"
_VERSION = 1  # of what the parts write; another one is other work
_WINDOW = 1000  # parts given to an executor at a time, enough for any cluster
_LOST_ON_CLUSTER = ("KilledWorker", "NoValidWorkerError", "FutureCancelledError")  # what Dask calls it
_NEW_POOLS = 3  # in a row that may break before any part is done
_locks: set[int] = set()  # that this process holds

Record = dict[str, Any]
Task = tuple[str, tuple]  # the name of its file, and the arguments of the function


class WorkFolder:
    """A folder of work, which is this run's alone until it is closed (`with` does that) or the process ends.

    Args:
        path: made if need be. It must mean the same to all workers: a file system that all of them see.
        work: what the work is, as JSON values.
        start_over: forget what was done, also of other work.

    Attributes:
        path: as an absolute path.
        stopping: set when a run ends early, for parts in threads of ours that take long.

    Raises:
        ValueError: the folder holds other work.
        BlockingIOError: another run is at work there.
    """

    def __init__(self, path: str | os.PathLike, work: dict[str, Any], *, start_over: bool = False) -> None:
        self.path = Path(path).resolve()
        self.path.mkdir(parents=True, exist_ok=True)
        self._lock = _locked(self.path)
        try:
            self._open(work, start_over)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> WorkFolder:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Let other runs work here."""
        if self._lock in _locks:
            _unlock(self._lock)
        self._lock = None

    def _open(self, work: dict[str, Any], start_over: bool) -> None:
        self._manifest = self.path / _MANIFEST
        self.stopping = threading.Event()
        self._records: dict[str, Record] = {}
        work = json.loads(json.dumps({"version": _VERSION, **work}))
        if start_over:
            self._forget()
        lines = self._lines()
        if not lines:
            self._manifest.write_text(json.dumps({"work": work}) + "\n", encoding="utf-8")
        elif (before := lines[0].get("work")) != work:
            before = before if isinstance(before, dict) else {}
            differing = [key for key in work if before.get(key) != work[key]] or sorted(set(before) - set(work))
            raise ValueError(
                f"{self.path} holds other work, with other {', '.join(differing)}; give another folder, or start it "
                "over (start_over=True, --start-over), which forgets what is there"
            )
        self._records = {line["file"]: line for line in lines[1:] if "file" in line}

    def record(self, name: str) -> Record | None:
        """What is remembered of a part that is done and whose file is still there, as long as it was."""
        record = self._records.get(name)
        path = self.path / name
        if record is None or not path.is_file() or path.stat().st_size != record["file_bytes"]:
            return None
        return record

    def bytes_done(self, names: Iterable[str]) -> int:
        """How much text the parts of these names were that have been done."""
        return sum(self._records[name]["bytes"] for name in names if name in self._records)

    def run(
        self,
        function: Callable[..., Record],
        tasks: Iterable[Task],
        executor: Executor | Callable[[], Executor],
        done: Callable[[Record], object] | None = None,
    ) -> None:
        """Do the parts that are not done yet.

        Args:
            function: gets the arguments of a task and the path of its file, and returns what is to be remembered.
            executor: given, or a way to make one: then one whose processes break is replaced by another.
            done: is told the record of each part, but for those that were done before.

        Raises:
            ChildProcessError: workers died; the message says with which part. What is done stays done.
            Exception: what a part raised; of several the first in the order of the tasks.
        """
        rest = [task for task in tasks if self.record(task[0]) is None]
        if isinstance(executor, Executor):
            self._run(function, rest, executor, done)
            return
        broken = 0
        while rest:
            num_before = len(rest)
            try:
                with executor() as own:
                    self._run(function, rest, own, done)
            except ChildProcessError:
                rest = [task for task in rest if self.record(task[0]) is None]
                broken = 0 if len(rest) < num_before else broken + 1
                if broken == _NEW_POOLS:
                    raise
            else:
                return

    def until_stopped(self, advance: Callable[[int], object]) -> Callable[[int], object]:
        """The same progress bar, which ends the work that moves it when the run has ended early."""

        def move(amount: int) -> None:
            if self.stopping.is_set():
                raise InterruptedError("the run has ended early")
            advance(amount)

        return move

    def tidy(self) -> None:
        """Remove what dead workers have left behind."""
        for path in self.path.glob("*.tmp"):
            shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)

    def _run(
        self,
        function: Callable[..., Record],
        tasks: Sequence[Task],
        executor: Executor,
        done: Callable[[Record], object] | None,
    ) -> None:
        numbers: dict[Future, int] = {}
        finished: SimpleQueue[Future] = SimpleQueue()
        coming = iter(enumerate(tasks))
        failed, error = len(tasks), None
        try:
            while True:
                for number, (name, arguments) in islice(coming, 0 if error else _WINDOW - len(numbers)):
                    try:
                        future = executor.submit(function, *arguments, str(self.path / name))
                    except BrokenExecutor as problem:
                        failed, error = number, problem
                        break
                    numbers[future] = number
                    future.add_done_callback(finished.put)
                # After a failure only the parts before it count: one of these may fail too.
                if not any(number < failed for number in numbers.values()):
                    break
                number = numbers.pop(future := finished.get())
                try:
                    record = self._note(tasks[number][0], future.result())
                except (Exception, CancelledError) as problem:
                    if number < failed:
                        failed, error = number, problem
                        for later in [later for later, its_number in numbers.items() if its_number > number]:
                            later.cancel()
                else:
                    if done is not None:
                        done(record)
        finally:
            if numbers:
                self.stopping.set()
            # Whoever interrupts this loses nothing that is done.
            for future, number in numbers.items():
                if not future.cancel() and future.done() and future.exception() is None:
                    self._note(tasks[number][0], future.result())
        if isinstance(error, BrokenExecutor | CancelledError) or type(error).__name__ in _LOST_ON_CLUSTER:
            raise ChildProcessError(
                f"a worker died at work on {tasks[failed][0]} or on what came after it (killed, or out of memory?): "
                f"{error!r:.200}. What is done is kept in {self.path}: run the same again to go on"
            ) from error
        if error is not None:
            raise error

    def _note(self, name: str, record: Record) -> Record:
        path = self.path / name
        if not path.is_file():
            raise FileNotFoundError(
                f"a worker has written {str(path)!r}, but it is not here: the folder must lie on a file system that "
                "all workers see"
            )
        self._records[name] = record = {"file": name, **record}
        with open(self._manifest, "a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
        return record

    def _lines(self) -> list[dict[str, Any]]:
        """The lines of the manifest; one that was not finished is ended, so that the next begins on its own."""
        if not self._manifest.is_file():
            return []
        content = self._manifest.read_bytes()
        if content and not content.endswith(b"\n"):
            with open(self._manifest, "ab") as file:
                file.write(b"\n")
        lines = []
        for line in content.splitlines():
            try:
                lines.append(json.loads(line))
            except ValueError:
                lines.append({})
        return lines

    def _forget(self) -> None:
        for line in self._lines():
            if "file" in line:
                for path in self.path.glob(f"{Path(line['file']).stem}.*"):  # with what describes it
                    path.unlink()
        self._manifest.unlink(missing_ok=True)


def _locked(folder: Path) -> int | None:
    """What holds the folder until it is closed; None where the system has no such locks.

    Another run would take the unfinished files of this one for what the dead have left behind.
    """
    if fcntl is None:
        return None
    lock = os.open(folder, os.O_RDONLY)
    _locks.add(lock)  # first, as another thread may fork at any time
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        _unlock(lock)
        if isinstance(error, BlockingIOError):
            raise BlockingIOError(
                f"another run is at work in {folder}: wait until it has ended, or give another folder"
            ) from None
        return None  # some file systems of networks have none
    return lock


def _unlock(lock: int) -> None:
    assert fcntl is not None
    _locks.remove(lock)
    with suppress(OSError):
        fcntl.flock(lock, fcntl.LOCK_UN)  # also for a child that was forked in between
    os.close(lock)


def _let_go() -> None:
    """Forked workers do not hold what their run does: they may outlive it for a while."""
    for lock in _locks:
        os.close(lock)
    _locks.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_let_go)


@contextmanager
def cluster(scheduler: str | None) -> Generator[Executor | None]:
    """The executor of a Dask cluster, whose scheduler has this address; None where none is given.

    Raises:
        ValueError: Dask is not installed.
        OSError: nobody answers there.
    """
    if scheduler is None:
        yield None
        return
    try:
        from distributed import Client
    except ImportError:
        raise ValueError("a cluster needs Dask: install the extra 'dist' (uv run --extra dist ...)") from None
    with Client(scheduler, set_as_default=False) as client:
        yield client.get_executor(pure=False)
