"""Serve a web page to explore tokenizers and a trained model.

`basic playground runs/quickstart` prints its address. The page shows the tokens of two tokenizers, and the texts of two
models, side by side: the loss of each token, its most likely alternatives, and where the heads attend to. Models with a
chat template answer.
"""

from __future__ import annotations

import errno
import os
import socket
import sys
import threading
import warnings
import webbrowser
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from basic.common import command_line
from basic.common.errors import DependencyError, InvalidInputError, how_to_install

if TYPE_CHECKING:
    from basic.Tokenizer import Tokenizer

FIRST_PORT, NUM_PORTS = 8000, 20


@dataclass(frozen=True, kw_only=True)
class Options:
    run: Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="[RUN [RUN ...]]")] = ()
    """Run folders of models, such as runs/quickstart, which come first in the page's list; the first two are shown side
    by side. None: those in --runs, the newest first."""
    runs: Path = Path("runs")
    """Folder of runs; their models and tokenizers can be selected on the page."""
    data: Path = Path("data")
    """Folder that may have r50k_base.tiktoken (GPT-2), cl100k_base.tiktoken and o200k_base.tiktoken, for comparison;
    they are also found where tiktoken keeps them. The page says how to get those that are missing."""
    compare: tuple[Path, ...] = ()
    """More tokenizers for comparison: a tokenizer.json, a folder, or a rank file that is named after its pattern, as
    those of tiktoken are: cl100k_base.tiktoken, o200k_base.tiktoken."""
    host: str = "127.0.0.1"
    """Address to listen on; 0.0.0.0 allows everyone on the network to open the page, for example from a phone."""
    port: int | None = None
    """Port to listen on; 0: any free port; None: 8000, or the next free one after it."""
    browser: bool = True
    """Open the page in a browser, if a person started the command at a terminal of a desktop."""
    device: str = "auto"
    """cpu, cuda, mps ...; auto: the fastest one available."""


def main(options: Options) -> None:
    print("starting the playground ...", flush=True)  # torch takes seconds to import
    from basic.analysis.playground.answers import Playground
    from basic.analysis.playground.server import create_app, serve
    from basic.bpe.loading import load_kernels
    from basic.training.checkpoints.of_run import newest_checkpoint
    from basic.training.run_folder import load_run_config

    if options.port is not None and not 0 <= options.port < 2**16:
        raise InvalidInputError(f"--port must be from 0 to 65535, got {options.port}")
    for run in options.run:  # a wrong folder is reported here, not by the page
        load_run_config(run)
        newest_checkpoint(run, warnings.warn)
    others = {path.resolve().name.partition(".")[0]: open_vocabulary(path) for path in options.compare}
    first = {name_of(run, options.runs): run for run in options.run}
    playground = Playground(options.runs, first, others=others, data=options.data, device=options.device)
    about = playground.about()
    if not about["tokenizers"]:
        raise FileNotFoundError(f"{options.runs} has no tokenizer yet; `basic quickstart` trains one in a few minutes")
    listener = listen(options.host, options.port)
    # Not during the first request for a long text, which would wait; nor before the page can be opened.
    threading.Thread(target=load_kernels, args=["encoding"], daemon=True).start()
    host, port = f"[{options.host}]" if ":" in options.host else options.host, listener.getsockname()[1]
    none = command_line.as_started("none yet; `basic quickstart` trains one")
    command_line.print_text(f"tokenizers  {', '.join(about['tokenizers'])}")  # names of folders
    command_line.print_text(f"models      {', '.join(model['name'] for model in about['models']) or none}")
    if options.port is None and port != FIRST_PORT:
        print(f"port        {FIRST_PORT} is taken, so {port} is used; --port chooses another")
    print(f"open        http://{host}:{port}/  (Ctrl-C to stop)", flush=True)
    if options.browser and has_person():
        webbrowser.open(f"http://{host}:{port}/")
    serve(create_app(playground, host=options.host), listener)


def name_of(run: Path, runs: Path) -> str:
    """The name of a run on the page: its path in the folder of runs, or the path as it was given."""
    inside = run.resolve().is_relative_to(runs.resolve())
    return run.resolve().relative_to(runs.resolve()).as_posix() if inside else str(run)


def open_vocabulary(path: Path) -> Tokenizer:
    """Open a tokenizer of another program; the name of a rank file says its pattern."""
    from basic.Tokenizer import Tokenizer

    pattern = path.stem if path.suffix == ".tiktoken" else None
    return Tokenizer.load(path, pattern=pattern)


def listen(host: str, port: int | None) -> socket.socket:
    """Listen on a port; None: the first free one from FIRST_PORT on."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    for candidate in [*range(FIRST_PORT, FIRST_PORT + NUM_PORTS), 0] if port is None else [port]:
        try:
            return socket.create_server((host, candidate), family=family)
        except OSError as error:
            if port is None and error.errno == errno.EADDRINUSE:
                continue
            reason = str(error.strerror).partition(" (")[0]
            remedy = "choose another --host or --port (0: any free port)"
            raise OSError(f"cannot listen on {host}, port {candidate} ({reason}); {remedy}") from error
    raise AssertionError("port 0 is never taken")


def has_person() -> bool:
    """Whether a person at a desktop reads the output: elsewhere a browser would open in the terminal, or nowhere."""
    has_desktop = sys.platform in ("darwin", "win32") or bool({"DISPLAY", "WAYLAND_DISPLAY"} & os.environ.keys())
    return sys.stdout.isatty() and has_desktop


def command() -> None:
    options = command_line.parse(Options, __doc__)
    try:
        main(options)
    except ModuleNotFoundError as error:
        if str(error.name).partition(".")[0] not in ("starlette", "uvicorn", "anyio"):
            raise
        remedy = how_to_install("playground", "starlette anyio uvicorn")
        raise DependencyError(f"{error.name} is not installed; {remedy}") from error
