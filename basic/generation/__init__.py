"""From a prompt to its continuation."""

from basic.generation.continuation import generate
from basic.generation.text import complete, stream

__all__ = ["complete", "generate", "stream"]
