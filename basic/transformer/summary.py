"""A table of a model's parameters: shapes, sizes and floating-point operations."""

from __future__ import annotations

import re
from typing import NamedTuple

from torch.nn import Module


class SummaryRow(NamedTuple):
    """A parameter of all layers together, or an operation without parameters."""

    name: str
    shape: tuple[int, ...]
    """Shape in one layer."""
    layers: int
    """Number of layers that have it."""
    parameters: int
    """Number of parameters in all layers; 0 for a tied matrix that is in another row."""
    flops_per_token: int
    """FLOPs of the matrix multiplications with it in a forward pass, all layers together."""


class Summary(NamedTuple):
    """Prints as a table."""

    rows: list[SummaryRow]

    def __repr__(self) -> str:
        lines = [("name", "shape", "layers", "parameters", "FLOPs per token")]
        for name, shape, layers, parameters, flops in self.rows:
            lines.append((name, " x ".join(map(str, shape)), str(layers), f"{parameters:,}", f"{flops:,}"))
        num_parameters, num_flops = (sum(row.parameters for row in self.rows), sum(row[-1] for row in self.rows))
        lines.append(("all", "", "", f"{num_parameters:,}", f"{num_flops:,}"))
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        alignments = "<<>>>"
        return "\n".join(
            "  ".join(f"{text:{side}{width}}" for text, side, width in zip(line, alignments, widths, strict=True))
            for line in lines
        )


def summarize(model: Module, context_length: int, flops_per_token: int) -> Summary:
    """A table of a Transformer's parameters.

    Args:
        context_length: length of the sequence for which the operations are counted.
        flops_per_token: FLOPs of all matrix multiplications in a forward pass; those without parameters are
            attention's.
    """
    rows: dict[str, SummaryRow] = {}
    seen = set()
    for name, parameter in model.named_parameters(remove_duplicate=False):
        name = re.sub(r"\.\d+\.", ".*.", name)
        row = rows.get(name, SummaryRow(name, tuple(parameter.shape), 0, 0, 0))
        # An embedding is looked up, not multiplied.
        is_multiplied = parameter.ndim == 2 and "embeddings" not in name
        rows[name] = row._replace(
            layers=row.layers + 1,
            parameters=row.parameters + (0 if parameter in seen else parameter.numel()),  # tied ones have two names
            flops_per_token=row.flops_per_token + (2 * parameter.numel() if is_multiplied else 0),
        )
        seen.add(parameter)
    attention_flops = flops_per_token - sum(row.flops_per_token for row in rows.values())
    num_layers = max(row.layers for row in rows.values())
    return Summary(
        [*rows.values(), SummaryRow(f"attention to {context_length} tokens", (), num_layers, 0, attention_flops)]
    )
