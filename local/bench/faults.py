"""Try what can go wrong for real, and count it: kills, damaged files, two writers, a full disk, naughty strings.

    uv run local/bench/faults.py                        # everything; takes an hour or two
    uv run local/bench/faults.py kills --only train --kills 20
    uv run local/bench/faults.py damage --only config.toml --flips 5000

Every script runs in a fork of this process, where all packages are imported already, so one try takes half a second.
The tries are drawn from --seed; what a kill meets also depends on the speed of the machine.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro
from fault_commands import SHARED, Child, Tries, content_of, differences, lost, next_line
from fault_inputs import damage, naughty

from basic.common import command_line

PARTS = Literal["kills", "damage", "pairs", "disk", "naughty"]


@dataclass(frozen=True, kw_only=True)
class Options:
    parts: tyro.conf.Positional[tuple[PARTS, ...]] = ("kills", "damage", "pairs", "disk", "naughty")
    """What to try."""
    only: tuple[str, ...] = ()
    """Only these commands or kinds of files."""
    kills: int = 300
    """Kills, of all commands together."""
    flips: int = 1000
    """Damaged copies of each kind of file: three of four have one flipped bit, the fourth is cut off."""
    pairs: int = 10
    """Times that each command is started twice at the same time."""
    seed: int = 0
    naughty: Path = SHARED / "naughty_strings.json"
    """JSON list of strings (the Big List of Naughty Strings)."""


def kills(tries: Tries, number: int) -> None:
    counts: Counter[str] = Counter()
    commands = list(tries.commands())
    while counts["kills"] < number:
        name, command = commands[counts["tries"] % len(commands)]
        folder, output, where = tries.new_folder(command), "", f"kills, {name}"
        counts["tries"] += 1
        for _ in range(tries.random.randint(1, 3)):
            child = Child(next_line(command, folder).split(), folder)
            time.sleep(tries.random.uniform(0.02, 1.1 * tries.seconds[name]))
            with suppress(ProcessLookupError):
                child.kill(workers=tries.random.random() < 0.5)
            result = child.wait()
            counts["kills" if result == "killed" else "ended before the kill"] += 1
            output = child.output
            if result not in ("killed", "ok", "one line"):
                tries.problem(where, result)
            try:
                for what in lost(folder, [tries.expected[name], tries.old[name]], output):
                    tries.problem(where, f"lost {what}")
            except Exception as error:
                tries.problem(where, f"does not load: {error!r}")
            counts[name] += result == "killed"
        tries.finish(name, command, folder, where)
        if counts["tries"] % 20 == 0:
            print("kills:", dict(counts), flush=True)
    print("kills:", dict(counts), flush=True)


def pairs(tries: Tries, times: int) -> None:
    """Start each command twice at about the same time; every second time, a command that resumes does so."""
    for name, command in tries.commands():
        counts: Counter[str] = Counter()
        for number in range(times):
            folder, where = tries.new_folder(command), f"pairs, {name}"
            if command.resume and number % 2:
                child = Child(command.line.split(), folder)
                time.sleep(0.6 * tries.seconds[name])
                child.kill(workers=True)
                child.wait()
            line = next_line(command, folder).split()
            first = Child(line, folder)
            time.sleep(tries.random.uniform(0, tries.seconds[name]) * (number % 3 > 0))
            results = sorted([Child(line, folder).wait(), first.wait()])
            counts[" + ".join(results)[:60]] += 1
            for result in results:
                if result not in ("ok", "one line"):
                    tries.problem(where, result)
            if "ok" not in results:
                tries.problem(where, f"nobody wins: {first.errors[-300:]}")
            tries.finish(name, command, folder, where, again=False)
        print(f"pairs, {name}:", dict(counts), flush=True)


def disk(tries: Tries) -> None:
    """Run each command where no file can become larger than a limit, as on a full disk; then again without."""
    for name, command in tries.commands():
        counts: Counter[str] = Counter()
        shares = (0.1, 0.25, 0.5, 0.75, 0.9, 0.99)
        for size in (0, 1, 100, 1000, 4096, *(int(share * tries.largest_bytes[name]) for share in shares)):
            folder, where = tries.new_folder(command), f"disk, {name}, {size} bytes"
            child = Child(next_line(command, folder).split(), folder, file_bytes=size)
            counts[result := child.wait()] += 1
            content = content_of(folder)
            if result not in ("ok", "one line"):
                tries.problem(where, result)
            if result != "ok" and command.old and any(content.get(key) != old for key, old in tries.old[name].items()):
                tries.problem(where, "the old output has changed")
            if result == "ok" and differences(content, tries.expected[name]):
                tries.problem(
                    where, f"says nothing: {differences(content, tries.expected[name])} {child.errors[-300:]}"
                )
            tries.finish(name, command, folder, where)
        print(f"disk, {name}:", dict(counts), flush=True)


def main(options: Options) -> None:
    with tempfile.TemporaryDirectory() as folder:
        tries = Tries(Path(folder).resolve(), options.seed, options.only)
        given = content_of(tries.given)
        parts = {
            "kills": lambda: kills(tries, options.kills),
            "damage": lambda: damage(tries, options.flips),
            "pairs": lambda: pairs(tries, options.pairs),
            "disk": lambda: disk(tries),
            "naughty": lambda: naughty(tries, options.naughty),
        }
        for part in options.parts:
            parts[part]()
        if changed := differences(content_of(tries.given), given):
            tries.problem("the inputs have changed", changed)
    for problem, count in tries.problems.items():
        print(f"{count} x {problem}")
    sys.exit(bool(tries.problems))


if __name__ == "__main__":
    command_line.run(lambda: main(command_line.parse(Options, __doc__)))
