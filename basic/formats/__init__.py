"""Models and tokenizers in the formats of other programs."""

from typing import TYPE_CHECKING

from basic.common.progress import lazy_names

if TYPE_CHECKING:
    from basic.formats.export_model import export_gguf, export_hf
    from basic.formats.import_model import import_hf, import_pt, import_run, load_model
    from basic.formats.tokenizers import load_tiktoken, save_tiktoken, save_tokenizer_json

__all__ = ["export_gguf", "export_hf", "import_hf", "import_pt", "import_run", "load_model"]
__all__ += ["load_tiktoken", "save_tiktoken", "save_tokenizer_json"]
_MODULES = {
    **dict.fromkeys(("export_hf", "export_gguf"), "formats.export_model"),
    **dict.fromkeys(("import_hf", "import_run", "import_pt", "load_model"), "formats.import_model"),
    **dict.fromkeys(("load_tiktoken", "save_tiktoken", "save_tokenizer_json"), "formats.tokenizers"),
}
__getattr__ = lazy_names(__name__, _MODULES)


def __dir__() -> list[str]:
    return __all__
