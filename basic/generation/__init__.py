"""From a prompt to its continuation."""

from typing import TYPE_CHECKING

from basic.common.progress import lazy_names

if TYPE_CHECKING:
    from basic.generation.continuation import generate
    from basic.generation.text import complete, stream

__all__ = ["complete", "generate", "stream"]
_MODULES = {"complete": "generation.text", "generate": "generation.continuation", "stream": "generation.text"}
__getattr__ = lazy_names(__name__, _MODULES)


def __dir__() -> list[str]:
    return __all__
