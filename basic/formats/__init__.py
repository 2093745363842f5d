"""Models and tokenizers in the formats of other programs."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from basic.formats.export_model import export_gguf as export_gguf
    from basic.formats.export_model import export_hf as export_hf
    from basic.formats.import_model import import_hf as import_hf
    from basic.formats.import_model import import_pt as import_pt
    from basic.formats.import_model import import_run as import_run
    from basic.formats.import_model import load_model as load_model
    from basic.formats.tiktoken_ranks import load_tiktoken as load_tiktoken
    from basic.formats.tiktoken_ranks import save_tiktoken as save_tiktoken
    from basic.formats.tokenizer_json import save_tokenizer_json as save_tokenizer_json


def __getattr__(name: str) -> Any:
    """Import a function when it is first used, so that the functions for tokenizers do not import torch."""
    if name in ("export_hf", "export_gguf"):
        from basic.formats import export_model as module
    elif name in ("import_hf", "import_run", "import_pt", "load_model"):
        from basic.formats import import_model as module
    elif name in ("load_tiktoken", "save_tiktoken"):
        from basic.formats import tiktoken_ranks as module
    elif name == "save_tokenizer_json":
        from basic.formats import tokenizer_json as module
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(module, name)
