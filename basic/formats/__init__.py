"""Models and tokenizers in the formats of other programs."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from basic.formats.export_model import export_gguf, export_hf
    from basic.formats.import_model import import_hf, import_pt, import_run, load_model
    from basic.formats.tokenizers import load_tiktoken, save_tiktoken, save_tokenizer_json

__all__ = ["export_gguf", "export_hf", "import_hf", "import_pt", "import_run", "load_model"]
__all__ += ["load_tiktoken", "save_tiktoken", "save_tokenizer_json"]
_MODULES = {
    **dict.fromkeys(("export_hf", "export_gguf"), "export_model"),
    **dict.fromkeys(("import_hf", "import_run", "import_pt", "load_model"), "import_model"),
    **dict.fromkeys(("load_tiktoken", "save_tiktoken", "save_tokenizer_json"), "tokenizers"),
}


def __getattr__(name: str) -> Any:
    """Import a function when it is first used, so that the functions for tokenizers do not import torch."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"basic.formats.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return __all__
