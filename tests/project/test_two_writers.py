"""Two commands that are to write one output: the second is refused before it reads, also if the output is new."""

import os
from pathlib import Path

import pytest

from basic.common.folder_lock import OutputLock
from tests.project.test_outputs import WRITTEN, refused

pytestmark = pytest.mark.skipif(os.name == "nt", reason="Windows has no such lock")

RUN = str(WRITTEN / "run")
COMMANDS = {
    "train_bpe": (("train_bpe", "a.txt", "--output", "out/tokenizer"), "out/tokenizer/vocab.json"),
    "encode": (("encode", "a.txt", "out/a.bin", "--tokenizer", f"{RUN}/tokenizer"), "out/a.bin"),
    "its sidecar": (("encode", "a.txt", "out/a.bin", "--tokenizer", f"{RUN}/tokenizer"), "out/a.json"),
    "consolidate": (("consolidate", "a_checkpoint", "out/a.safetensors"), "out/a.safetensors"),
    "report": (("report", RUN, "--output", "out/report.html"), "out/report.html"),
    "plot": (("plot", RUN, "--output", "out/loss.png"), "out/loss.png"),
    "picture": (("picture", RUN, "--output", "out/picture.svg"), "out/picture.svg"),
    "export": (("export", RUN, "out/llama"), "out/llama"),
    "export of a tokenizer": (("export", RUN, "out/ranks", "--to", "tiktoken"), "out/ranks"),
}


@pytest.mark.parametrize("name", COMMANDS)
def test_the_second_writer_of_a_new_output_is_refused(name: str, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    command, output = COMMANDS[name]
    Path("a.txt").write_text("some text")
    Path(output).parent.mkdir(parents=True)
    with OutputLock(output):
        refused(monkeypatch, rf".*{Path(output).name} is being written by process {os.getpid()} on", *command)
