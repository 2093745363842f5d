"""Convert the weights of another program to a run: `basic import my_llama --output runs/my_llama`.

The source is a Llama, Mistral, Qwen 2, Qwen 3 or OLMo 2 model: a folder as transformers saves it (config.json, the
weights as safetensors in one file or several with an index, and tokenizer.json), or a GGUF file. All commands open the
result like a run that was trained here.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from basic.common.errors import InvalidInputError


@dataclass(frozen=True, kw_only=True)
class Options:
    source: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")]
    """Folder or GGUF file of a model; with --unpickle and --config also a .pt file, a state dict with this library's
    keys."""
    output: Path
    """Run folder to create, such as runs/my_llama; must not exist."""
    context_length: int | None = None
    """Context length of the run, if it is to be shorter than that of the model; None for the same."""
    tokenizer: bool = True
    """Also import the tokenizer, which must be byte-level BPE; a run without one works on token ids only."""
    config: Path | None = None
    """.pt file: the configuration of the run, a TOML file as for training, with its model and its tokenizer."""
    unpickle: bool = False
    """Allow weights in a pickle (pytorch_model.bin, or a .pt file), a format that can contain code. They are read by
    torch.load with weights_only=True, which creates only tensors and plain containers and refuses everything else."""


def main(options: Options) -> None:
    from basic.common.config_files import load_config
    from basic.common.files import make_folder
    from basic.formats.gguf_file import is_gguf
    from basic.formats.import_model import import_pt, import_run
    from basic.training.run_folder import load_run
    from basic.training.settings import RunConfig

    if not options.source.exists():
        source = str(options.source)
        raise FileNotFoundError(f"there is no file or folder {source!r}; give a model's folder or a GGUF file")
    make_folder(options.output.parent)
    if options.source.is_dir() or is_gguf(options.source):
        import_run(
            options.source,
            options.output,
            context_length=options.context_length,
            with_tokenizer=options.tokenizer,
            unpickle=options.unpickle,
        )
    elif options.config is None or not options.unpickle:
        raise InvalidInputError(
            f"{options.source} is a file, and not a GGUF file; if it is a state dict written by torch.save, add "
            "--unpickle and --config FILE.toml, the configuration of its model"
        )
    else:
        import_pt(options.source, options.output, load_config(options.config, RunConfig))
    run = load_run(options.output, device="cpu")
    print(f"wrote {options.output}, a model with {run.model.num_parameters:,} parameters")
