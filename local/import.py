"""Make a run of other people's weights: `uv run local/import.py my_llama --output runs/my_llama`.

A folder is a Llama as transformers saves it: config.json, the weights as safetensors (one file, or parts with their
index) and tokenizer.json. local/generate.py then opens the run like one trained here.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import tyro

from basic.common import command_line


@dataclass(frozen=True, kw_only=True)
class Options:
    source: tyro.conf.Positional[Path]
    """Folder of a Llama; or, with --unpickle and --config, a .pt file with a state dict of this library's names."""
    output: Path
    """Folder for the run, such as runs/my_llama; must not be there yet."""
    context_length: int | None = None
    """Tokens that a Llama shall look at; None for as many as it was made for."""
    tokenizer: bool = True
    """Whether to take over the tokenizer of a Llama, which must be byte-level BPE; a run without one knows ids only."""
    config: Path | None = None
    """The run that a .pt file shall be: a TOML file as for local/train.py, with its model and its tokenizer."""
    unpickle: bool = False
    """Read weights from a pickle (pytorch_model.bin, or the .pt file), a format that can carry code. They are read by
    torch.load with weights_only=True, which makes tensors and plain containers only and refuses all else."""


def main(options: Options) -> None:
    from basic.common.config_files import load_config
    from basic.formats.import_model import import_hf, import_pt
    from basic.training.run_folder import load_run
    from basic.training.settings import RunConfig

    if not options.source.exists():
        raise FileNotFoundError(f"there is no {options.source}")
    options.output.parent.mkdir(parents=True, exist_ok=True)
    if options.source.is_dir():
        import_hf(
            options.source,
            options.output,
            context_length=options.context_length,
            with_tokenizer=options.tokenizer,
            unpickle=options.unpickle,
        )
    elif options.config is None or not options.unpickle:
        raise ValueError(
            f"{options.source} is a file; if torch.save wrote it, add --unpickle to have its state dict read, and "
            "--config FILE.toml to say which model it is"
        )
    else:
        import_pt(options.source, options.output, load_config(options.config, RunConfig))
    run = load_run(options.output, device="cpu")
    print(f"a model of {run.model.num_parameters:,} parameters is now in {options.output}")


if __name__ == "__main__":
    command_line.run(lambda: main(tyro.cli(Options, description=__doc__)))
