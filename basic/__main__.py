"""The command `basic`, which is also `python -m basic`; the scripts in local/ start one of its commands."""

from __future__ import annotations

import os
import sys
from collections.abc import MutableMapping
from importlib import import_module
from pathlib import Path
from types import ModuleType

from basic import __version__
from basic.common import command_line

# The modules are imported when they are needed: importing torch takes seconds.
COMMANDS = {
    "quickstart": ("commands.quickstart", "from nothing to a small model that writes stories, in minutes"),
    "train-bpe": ("commands.train_bpe", "train a tokenizer on text"),
    "encode": ("commands.encode", "encode text into token ids"),
    "train": ("commands.train", "train a model"),
    "generate": ("commands.generate", "continue a prompt with a model"),
    "evaluate": ("commands.show.evaluate", "loss, perplexity and bits per byte of a model on a file"),
    "plot": ("commands.show.plot", "the losses of runs as a picture"),
    "report": ("commands.show.report", "curves, samples and settings of a run as one HTML file"),
    "playground": ("commands.show.playground", "a web page to explore a model and tokenizers"),
    "sweep": ("commands.sweep", "train and compare runs with different settings"),
    "export": ("commands.convert.export_model", "a model or tokenizer for other programs"),
    "import": ("commands.convert.import_model", "a run from the model of another program"),
    "consolidate": ("commands.convert.consolidate", "one file from the sharded checkpoint of several GPUs"),
    "questions": ("assignment_question", "the assignment's written questions, answered"),
}


COMPUTING = ("quickstart", "train", "generate", "evaluate", "playground", "sweep")
"""The commands that compute with a model."""


def main(name: str | None = None) -> None:
    """Run a command with the arguments of the process.

    Args:
        name: the command; None: the first argument names it.
    """
    if name is None:
        sys.argv[0] = "python -m basic" if Path(sys.argv[0]).name == "__main__.py" else "basic"
        name = sys.argv[1] if len(sys.argv) > 1 else "--help"
        if name in ("-h", "--help"):
            print(overview())
            return
        if name == "--version":
            print(f"basic {__version__}")
            return
        if name.replace("_", "-") not in COMMANDS:
            sys.exit(
                f"error: there is no command {command_line.escape(name)!r}; the commands are {', '.join(COMMANDS)}"
            )
        name = name.replace("_", "-")
        sys.argv[:2] = [f"{sys.argv[0]} {name}"]
    computes = name in COMPUTING and not {"-h", "--help"} & set(sys.argv)
    if computes and (choice := choose_threads(os.environ, *machine_state())):
        print(choice, file=sys.stderr)
    command_line.run(lambda: run_command(import_module(f"basic.{COMMANDS[name][0]}")))


def run_command(module: ModuleType) -> None:
    """Call `command` of a module, or, if it has none, its `main` with the options of the command line."""
    if hasattr(module, "command"):
        module.command()
    else:
        module.main(command_line.parse(module.Options, module.__doc__))


def machine_state() -> tuple[int, float, float]:
    """The processors of this process, how many of them its control group may use, and how many others use now."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota, load = float(cores), 0.0
    try:
        limit, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        quota = quota if limit == "max" else min(quota, int(limit) / int(period))
    except (OSError, ValueError):
        pass  # another system, or an older kind of control groups
    if hasattr(os, "getloadavg"):
        load = os.getloadavg()[0] * cores / (os.cpu_count() or 1)
    return cores, quota, load


def choose_threads(environment: MutableMapping[str, str], cores: int, quota: float, load: float) -> str | None:
    """Set how many threads torch starts and how they wait for each other, before it is imported.

    The default, one thread a core that spins for milliseconds while it waits, takes ten times as long where it does
    not have all cores for itself. What the user has set stays. Figures: docs/benchmarks/cpu.md.

    Returns:
        A line that says so; None if nothing is special.
    """
    if any(name.startswith(("OMP_", "GOMP_", "KMP_", "MKL_")) for name in environment):
        return None
    threads = max(1, min(cores, int(quota)))
    if threads < cores:
        environment["OMP_NUM_THREADS"] = str(threads)
    if load < 0.5 and threads == cores:
        environment["GOMP_SPINCOUNT"] = "10000"  # should other programs start later
        return None
    environment["OMP_WAIT_POLICY"] = "PASSIVE"
    reason = (
        f"other programs make a load of {load:.1f} on {cores} core{'s' * (cores > 1)}"
        if threads == cores
        else f"of {cores} cores, {quota:g} may be used"
    )
    return (
        f"basic: {reason}: {threads} thread{'s' * (threads > 1)}, which wait{'s' * (threads == 1)} without spinning "
        f"(to choose: OMP_NUM_THREADS={threads}, OMP_WAIT_POLICY=ACTIVE)"
    )


def overview() -> str:
    """The help text: a line for each command."""
    width = max(map(len, COMMANDS))
    lines = [f"  {name:{width}}  {text}" for name, (_, text) in COMMANDS.items()]
    usage = f"usage: {command_line.command('COMMAND')} [OPTIONS]"
    return "\n".join([usage, "", *lines, "", "COMMAND --help lists its options."])


if __name__ == "__main__":
    main()
