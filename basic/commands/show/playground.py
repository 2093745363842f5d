"""Serve a web page to explore tokenizers and a trained model.

`basic playground runs/quickstart` prints its address. The page shows the tokens of two
tokenizers side by side, generates text, and shows the loss and the most likely alternatives of each token.
"""

from __future__ import annotations

import errno
import os
import socket
import sys
import webbrowser
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import tyro

from basic.common import command_line
from basic.common.errors import DependencyError, InvalidInputError, how_to_install

if TYPE_CHECKING:
    from basic.Tokenizer import Tokenizer

GPT2 = Path("data")
FIRST_PORT, NUM_PORTS = 8000, 20


@dataclass(frozen=True, kw_only=True)
class Options:
    run: tyro.conf.Positional[Path | None] = None
    """Run folder of the model, such as runs/quickstart; None: the newest run in --runs."""
    runs: Path = Path("runs")
    """Folder of runs; their tokenizers can be selected on the page."""
    gpt2_vocab: Path = GPT2 / "gpt2_vocab.json"
    """Vocabulary of GPT-2, vocab.json as it is published, for comparison; omitted if the file does not exist."""
    gpt2_merges: Path = GPT2 / "gpt2_merges.txt"
    """Merges of GPT-2, merges.txt."""
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
    from basic.analysis.playground import Playground, newest_run
    from basic.analysis.playground_server import create_app, serve
    from basic.bpe.loading import load_kernels
    from basic.training.run_folder import load_run

    if options.port is not None and not 0 <= options.port < 2**16:
        raise InvalidInputError(f"--port must be from 0 to 65535, got {options.port}")
    folder = options.run or newest_run(options.runs)
    run = None if folder is None else load_run(folder, device=options.device)
    name = "" if folder is None else folder.resolve().name
    others = {path.resolve().name.partition(".")[0]: open_vocabulary(path) for path in options.compare}
    gpt2 = options.gpt2_vocab, options.gpt2_merges
    playground = Playground(options.runs, run, name, gpt2=gpt2, others=others)
    tokenizers = playground.about()["tokenizers"]
    if not tokenizers:
        raise FileNotFoundError(f"{options.runs} has no tokenizer yet; `basic quickstart` trains one in a few minutes")
    listener = listen(options.host, options.port)
    load_kernels("encoding")  # not during the first request for a long text, which would wait
    host, port = f"[{options.host}]" if ":" in options.host else options.host, listener.getsockname()[1]
    command_line.print_text(f"tokenizers  {', '.join(tokenizers)}")  # names of folders
    none = command_line.as_started("none yet; `basic quickstart` trains one")
    print(f"model       {none if run is None else f'{folder}, step {run.step:,}'}")
    if not options.compare:
        print("more        --compare cl100k_base.tiktoken, a tokenizer.json or a folder adds tokenizers for comparison")
    if options.port is None and port != FIRST_PORT:
        print(f"port        {FIRST_PORT} is taken, so {port} is used; --port chooses another")
    print(f"open        http://{host}:{port}/  (Ctrl-C to stop)", flush=True)
    if options.browser and has_person():
        webbrowser.open(f"http://{host}:{port}/")
    serve(create_app(playground, host=options.host), listener)


def open_vocabulary(path: Path) -> Tokenizer:
    """Open a tokenizer of another program; the name of a rank file says its pattern."""
    from basic.Tokenizer import Tokenizer

    pattern = path.stem if path.suffix == ".tiktoken" else None
    return Tokenizer.load(command_line.tokenizer_folder(path), pattern=pattern)


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
