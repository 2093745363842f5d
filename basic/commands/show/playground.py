"""Serve a web page to explore tokenizers and a trained model.

`basic playground runs/quickstart` prints its address. The page shows the tokens of two
tokenizers side by side, generates text, and shows the loss and the most likely alternatives of each token.
"""

from __future__ import annotations

import socket
from dataclasses import dataclass
from pathlib import Path

import tyro

from basic.common import command_line
from basic.common.errors import DependencyError, InvalidInputError, how_to_install

GPT2 = Path("data")


@dataclass(frozen=True, kw_only=True)
class Options:
    run: tyro.conf.Positional[Path | None] = None
    """Run folder of the model, such as runs/quickstart; None: the newest run in --runs."""
    runs: Path = Path("runs")
    """Folder of runs; their tokenizers can be selected on the page."""
    gpt2_vocab: Path = GPT2 / "gpt2_vocab.json"
    """Vocabulary of GPT-2, for comparison; omitted if the file does not exist."""
    gpt2_merges: Path = GPT2 / "gpt2_merges.txt"
    """Merges of GPT-2."""
    host: str = "127.0.0.1"
    """Address to listen on; 0.0.0.0 allows everyone on the network to open the page, for example from a phone."""
    port: int = 8000
    """Port to listen on; 0: any free port."""
    device: str = "auto"
    """cpu, cuda, mps ...; auto: the fastest one available."""


def main(options: Options) -> None:
    from basic.analysis.playground import Playground, newest_run
    from basic.analysis.playground_server import create_app, serve
    from basic.bpe.loading import load_kernels
    from basic.training.run_folder import load_run

    if not 0 <= options.port < 2**16:
        raise InvalidInputError(f"--port must be from 0 to 65535, got {options.port}")
    folder = options.run or newest_run(options.runs)
    run = None if folder is None else load_run(folder, device=options.device)
    name = "" if folder is None else folder.resolve().name
    playground = Playground(options.runs, run, name, gpt2=(options.gpt2_vocab, options.gpt2_merges))
    tokenizers = playground.about()["tokenizers"]
    if not tokenizers:
        raise FileNotFoundError(f"{options.runs} has no tokenizer yet; `basic quickstart` trains one in a few minutes")
    family = socket.AF_INET6 if ":" in options.host else socket.AF_INET
    try:
        listener = socket.create_server((options.host, options.port), family=family)
    except OSError as error:
        reason, remedy = str(error.strerror).partition(" (")[0], "choose another --host or --port (0: any free port)"
        raise OSError(f"cannot listen on {options.host}, port {options.port} ({reason}); {remedy}") from error
    load_kernels("encoding")  # not during the first request for a long text, which would wait
    host = f"[{options.host}]" if family == socket.AF_INET6 else options.host
    command_line.print_text(f"tokenizers  {', '.join(tokenizers)}")  # names of folders
    none = command_line.as_started("none yet; `basic quickstart` trains one")
    print(f"model       {none if run is None else f'{folder}, step {run.step:,}'}")
    print(f"open        http://{host}:{listener.getsockname()[1]}/  (Ctrl-C to stop)", flush=True)
    serve(create_app(playground, host=options.host), listener)


def command() -> None:
    options = command_line.parse(Options, __doc__)
    try:
        main(options)
    except ModuleNotFoundError as error:
        if str(error.name).partition(".")[0] not in ("starlette", "uvicorn", "anyio"):
            raise
        remedy = how_to_install("playground", "starlette anyio uvicorn")
        raise DependencyError(f"{error.name} is not installed; {remedy}") from error
