"""Kernels for Hopper GPUs are compiled here, without one; tests/gpu runs them against their oracle."""

from __future__ import annotations

import pytest

pytest.importorskip("triton.experimental.gluon", reason="needs Triton with Gluon")

import triton
from triton.backends.compiler import GPUTarget
from triton.experimental.gluon import language as gl
from triton.experimental.gluon._runtime import GluonASTSource

from basic.transformer.kernels.attention import hopper, hopper_gradients

TYPES = {"OUT": "*bf16", "DQ": "*bf16", "STARTS": "*i32", "C": "constexpr", "scale": "fp32", "out_scale": "fp32"}
TYPES |= dict.fromkeys(("LOG_SUMS", "DELTAS", "COS", "SIN"), "*fp32")


@pytest.mark.parametrize(
    ("kernel", "products"),
    [
        (hopper._forward, 2 + 2),  # those of the loop, and those before and behind it
        (hopper_gradients._query_gradients, 3),
    ],
    ids=["forward", "gradients of queries"],
)
def test_they_compile_for_hopper(kernel, products):
    signature = {name: TYPES.get(name, "i32") for name in kernel.arg_names}
    tiles = [name for name in signature if name.endswith("_desc")]
    for name in tiles:
        rows = 128 if name in ("k_desc", "v_desc") else 64
        signature[name] = f"tensordesc<bf16[1, {rows}, 1, 128],{gl.NVMMASharedLayout(128, 16, 4)!r}>"
    constants = hopper.Constants(*map(gl.constexpr, (2, 100, True)))
    source = GluonASTSource(kernel, signature, {(kernel.arg_names.index("C"),): constants})
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4})
    groups = 2
    code = compiled.asm["ptx"]
    assert code.count("wgmma.commit_group") == groups * products
    assert code.count("cp.async.bulk.tensor") >= len(tiles)
