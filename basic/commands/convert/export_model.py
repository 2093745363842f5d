"""Export a trained model for other programs: `basic export runs/quickstart --to hf my_llama`.

hf: a folder that transformers loads with AutoModelForCausalLM and AutoTokenizer.
gguf: a file for llama.cpp and Ollama, with the tokenizer.
tiktoken: the tokenizer alone, as a rank file.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from basic.common.errors import InvalidInputError


@dataclass(frozen=True, kw_only=True)
class Options:
    run: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    """Run folder, such as runs/quickstart."""
    output: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="OUTPUT")]
    """hf: the folder to create; gguf, tiktoken: the file to write. It must not exist."""
    checkpoint: int | Literal["best", "last"] = "last"
    """The step of a checkpoint, best for the one with the lowest validation loss, or last for the newest."""
    to: Literal["hf", "gguf", "tiktoken"] = "hf"
    """Format of the export."""
    dtype: Literal["float32", "bfloat16", "float16", "q8_0"] | None = None
    """Type of the weights. hf: None for float32, as they were trained; gguf: None for float16. q8_0, for gguf only, has
    8 bits and a scale for each 32 numbers."""
    tokenizer: bool = True
    """Whether to export the tokenizer with the model."""


def main(options: Options) -> None:
    from basic.common.files import make_folder
    from basic.common.outputs import Output, check_outputs
    from basic.formats.export_model import export_gguf, export_hf
    from basic.formats.tokenizers import save_tiktoken
    from basic.training.run_folder import load_run

    if options.to == "hf" and options.output.suffix in (".gguf", ".tiktoken"):
        raise InvalidInputError(
            f"{options.output} is the name of a {options.output.suffix} file, but --to hf writes a folder; add --to "
            f"{options.output.suffix[1:]}, or give a folder's name"
        )
    check_outputs([Output(options.output, "an export", is_folder=options.to == "hf")])
    run = load_run(options.run, checkpoint=options.checkpoint, device="cpu")
    tokenizer = None if run.tokenizer_path is None else run.tokenizer
    make_folder(options.output.parent)
    exported = (run.model, options.output, tokenizer if options.tokenizer else None)
    end_of_text = run.config.train.end_of_text
    if options.to == "gguf":
        types: dict[str | None, Any] = {"float32": "F32", "bfloat16": "BF16", "q8_0": "Q8_0"}
        export_gguf(*exported, end_of_text=end_of_text, matrix_type=types.get(options.dtype, "F16"))
        print(f"wrote {options.output} ({options.output.stat().st_size / 1e6:,.1f} MB)")
        return
    if options.to == "hf":
        if options.dtype == "q8_0":
            raise InvalidInputError("--dtype q8_0 is for --to gguf; a Hugging Face folder takes the other types")
        export_hf(*exported, end_of_text=end_of_text, dtype=options.dtype)
        print(f"wrote {options.output}: {', '.join(sorted(path.name for path in options.output.iterdir()))}")
        return
    if tokenizer is None:
        raise InvalidInputError(f"{options.run} has no tokenizer/ folder, so there is no tokenizer to export")
    save_tiktoken(tokenizer, options.output, overwrite=False)  # another export may have written it meanwhile
    print(f"wrote {options.output}; also pass these to tiktoken.Encoding:")
    print(f"  pat_str={tokenizer.compiled_pattern.splits[0]!r}")
    print(f"  special_tokens={tokenizer.special_token_ids!r}")
