"""A model's parts as a table: shapes, parameters, floating-point operations."""

from __future__ import annotations

import re
from typing import NamedTuple

from torch.nn import Module


class Part(NamedTuple):
    """Parameters that have the same place in every layer, or a computation without any."""

    name: str
    shape: tuple[int, ...]
    """Of one of them."""
    times: int
    """How many there are."""
    parameters: int
    """Numbers in all of them; 0 for a matrix that is counted elsewhere already."""
    flops_per_token: int
    """Of the matrix products with all of them, in a forward pass."""


class Summary(NamedTuple):
    """Shows itself as a table."""

    parts: list[Part]

    def __repr__(self) -> str:
        lines = [("part", "shape", "times", "parameters", "FLOPs a token")]
        for name, shape, times, parameters, flops in self.parts:
            lines.append((name, " x ".join(map(str, shape)), str(times), f"{parameters:,}", f"{flops:,}"))
        totals = (f"{sum(part.parameters for part in self.parts):,}", f"{sum(part[-1] for part in self.parts):,}")
        lines.append(("all", "", "", *totals))
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        left = (True, True, False, False, False)
        return "\n".join(
            "  ".join(
                text.ljust(width) if is_left else text.rjust(width)
                for text, width, is_left in zip(line, widths, left, strict=True)
            )
            for line in lines
        )


def summarize(model: Module, context_length: int, flops_per_token: int) -> Summary:
    """Table of a Transformer's parameters.

    Args:
        context_length: tokens in the sequence that the operations are counted for.
        flops_per_token: of all matrix products in a forward pass; what the parameters do not explain is attention's.
    """
    parts: dict[str, Part] = {}
    seen = set()
    for name, parameter in model.named_parameters(remove_duplicate=False):
        name = re.sub(r"\.\d+\.", ".*.", name)
        numbers = 0 if parameter in seen else parameter.numel()  # a tied matrix has two names
        multiplied = parameter.ndim == 2 and not name.startswith("token_embeddings")  # rows of those are looked up
        flops = 2 * parameter.numel() if multiplied else 0
        before = parts.get(name, Part(name, tuple(parameter.shape), 0, 0, 0))
        parts[name] = before._replace(
            times=before.times + 1,
            parameters=before.parameters + numbers,
            flops_per_token=before.flops_per_token + flops,
        )
        seen.add(parameter)
    rest = flops_per_token - sum(part.flops_per_token for part in parts.values())
    layers = max(part.times for part in parts.values())
    attention = Part(f"attention to {context_length} tokens", (), layers, 0, rest)
    return Summary([*parts.values(), attention])
