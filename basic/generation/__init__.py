"""From a prompt to its continuation."""

from basic.generation.sampling import generate as generate
from basic.generation.text import complete as complete
from basic.generation.text import stream as stream
