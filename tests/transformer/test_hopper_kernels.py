"""Kernels for Hopper GPUs are compiled here, without one; tests/gpu runs them against their oracle."""

from __future__ import annotations

import pytest

pytest.importorskip("triton.experimental.gluon", reason="needs Triton with Gluon")

import triton
from triton.backends.compiler import GPUTarget
from triton.experimental.gluon import language as gl
from triton.experimental.gluon._runtime import GluonASTSource

from basic.transformer.kernels.attention import hopper, hopper_gradients

TYPES = dict.fromkeys(("OUT", "DQ", "DK", "DV"), "*bf16") | dict.fromkeys(("scale", "out_scale"), "fp32")
TYPES |= dict.fromkeys(("LOG_SUMS", "DELTAS", "COS", "SIN"), "*fp32")
TYPES |= {"C": "constexpr"} | dict.fromkeys(
    ("sums_desc", "deltas_desc"), f"tensordesc<fp32[64],{gl.NVMMASharedLayout(0, 32, 1)!r}>"
)


def tiles(rows: int, head_size: int) -> str:
    return f"tensordesc<bf16[1, {rows}, 1, {head_size}],{gl.NVMMASharedLayout(128, 16, 4)!r}>"


@pytest.mark.parametrize(
    ("kernel", "shapes", "head_size", "products"),
    [
        (hopper._forward, hopper._FORWARD_SHAPES, 64, 2 + 2),  # those of the loop, and those before and behind it
        (hopper_gradients._query_gradients, hopper_gradients._QUERY_GRADIENT_SHAPES, 128, 3 + 3),
        (hopper_gradients._key_gradients, hopper_gradients._KEY_GRADIENT_SHAPES, 64, 4),
    ],
    ids=["forward", "gradients of queries", "gradients of keys and values"],
)
def test_they_compile_for_hopper(kernel, shapes, head_size, products):
    groups, tokens, *_ = shape = shapes[head_size]
    types = dict.fromkeys(("q_desc", "do_desc"), tiles(64, head_size))
    types |= dict.fromkeys(("k_desc", "v_desc"), tiles(tokens, head_size)) | TYPES
    signature = {name: types.get(name, "i32") for name in kernel.arg_names}
    constants = hopper.Constants(*map(gl.constexpr, (2, 100, head_size, *shape)))
    source = GluonASTSource(kernel, signature, {(kernel.arg_names.index("C"),): constants})
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4})
    code = compiled.asm["ptx"]
    assert code.count("wgmma.commit_group") == groups * products
    assert code.count("cp.async.bulk.tensor") >= sum(name.endswith("_desc") for name in signature)
