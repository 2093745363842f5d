"""Every kernel on the CPU. test_kernels.py runs this file in a process where Triton interprets its kernels."""

from __future__ import annotations

import copy
import math
import os
from pathlib import Path
from typing import Any, cast

import pytest
import torch
import triton.language as tl
from triton.runtime import interpreter

from basic.generation import continuation, gpu_decoder
from basic.model import Linear, ModelConfig, TransformerLM
from basic.training.loop import make_optimizer
from basic.training.parallel.world import SINGLE_PROCESS, World, join_world
from basic.training.settings import TrainConfig
from basic.training.step import TrainStep
from basic.transformer.kernels import dispatch, operators
from basic.transformer.kernels.attention import flash_attention
from basic.transformer.kernels.interpreter import INTERPRETED
from tests.helpers import fp8_checks, kernel_checks, ranks_tools
from tests.helpers.forks import exit_status, run_in_fork

assert INTERPRETED, "run this through tests/interpreted/test_kernels.py, which sets TRITON_INTERPRET=1"

# Half of the interpreter's time: it adapts triton.language again for each call of a function by a kernel, and looks for
# overflows of small numbers.
patch_lang = interpreter._patch_lang


def patch_lang_once(function: Any) -> Any:
    modules = [value for value in function.__globals__.values() if value is tl or value is tl.core]
    is_patched = not any(tl.core.is_builtin(module.load) for module in modules)
    return interpreter._LangPatchScope() if is_patched else patch_lang(function)


interpreter._patch_lang = patch_lang_once
interpreter.interpreter_builder.options = interpreter.InterpreterOptions(sanitize_overflow=False)

FLOAT32, FLOAT16, BFLOAT16 = torch.float32, torch.float16, torch.bfloat16

MODERN: dict[str, Any] = {"ffn": "relu2", "qk_norm": True, "embedding_norm": True, "value_embeddings": True}


@pytest.mark.parametrize(
    ("seq", "head_size", "dtype", "heads", "group"),
    [
        *((33, size, FLOAT32, 2, 1) for size in (2, 16, 20, 48, 64, 96, 128, 136, 256)),
        *((seq, 16, FLOAT32, 2, 1) for seq in (1, 2, 17, 64, 128, 131)),
        *((33, size, dtype, 2, 1) for size in (32, 48) for dtype in (FLOAT16, BFLOAT16)),
        *((seq, 16, FLOAT32, 6, group) for seq in (1, 33) for group in (2, 3, 6)),
    ],
)
def test_attention(seq, head_size, dtype, heads, group):
    batch = 1 if seq > 100 else 2
    kernel_checks.check_attention(seq, head_size, dtype, "cpu", batch=batch, heads=heads, group=group)


@pytest.mark.parametrize(("seq", "window", "group"), [(131, 2, 1), (99, 20, 2), (131, 64, 1), (200, 100, 1), (5, 9, 3)])
def test_attention_in_a_window(seq, window, group):
    kernel_checks.check_attention(seq, 16, FLOAT32, "cpu", batch=1, heads=group, group=group, window=window)


@pytest.mark.parametrize(
    ("seq", "documents", "window", "group"),
    [(131, 1, 0, 1), (131, 5, 0, 1), (99, 9, 20, 2), (70, 3, 0, 3), (7, 4, 0, 1)],
)
def test_attention_in_packed_documents(seq, documents, window, group):
    options = {"batch": 2, "heads": group, "group": group, "window": window, "documents": documents}
    kernel_checks.check_attention(seq, 16, FLOAT32, "cpu", **options)


def test_gradients_of_keys_skip_queries_behind_their_document():
    q, k, v, do = torch.randn(4, 1, 192, 1, 16).unbind()
    starts = torch.zeros(1, 192, dtype=torch.int32)
    starts[:, 64:] = 64
    output, log_sums = flash_attention.forward(q, k, v, starts=starts)
    do[:, 64:] = torch.nan  # a masked weight of 0 times NaN is NaN
    dq, dk, dv = (torch.empty_like(x) for x in (q, k, v))
    cos, sin = torch.ones(192, 8), torch.zeros(192, 8)
    flash_attention.backward(q, k, v, output, log_sums, do, dq, dk, dv, cos, sin, starts=starts)
    assert not any(gradient[:, :64].isnan().any() for gradient in (dq, dk, dv))
    assert dk[:, 64:].isnan().any()


def test_attention_finds_nan():
    kernel_checks.check_attention_finds_nan(16, FLOAT32, "cpu")


@pytest.mark.parametrize("dtype", [FLOAT32, FLOAT16, BFLOAT16])
def test_rotation(dtype):
    kernel_checks.check_rotation(7, 48, dtype, "cpu")


@pytest.mark.parametrize("dtype", [FLOAT32, FLOAT16, BFLOAT16])
@pytest.mark.parametrize("shape", [(3, 5, 2 * 37), (9, 2 * 192)])
def test_swiglu(shape, dtype):
    kernel_checks.check_swiglu(shape, dtype, "cpu")


@pytest.mark.parametrize("dtype", [FLOAT32, FLOAT16, BFLOAT16])
@pytest.mark.parametrize(("vocab_size", "chunk_rows"), [(11, 7), (300, 7), (5000, 3)])
def test_cross_entropy(vocab_size, chunk_rows, dtype):
    kernel_checks.check_cross_entropy(7, vocab_size, chunk_rows, dtype, "cpu")


@pytest.mark.parametrize(("vocab_size", "chunk_rows", "ignore_index"), [(11, 7, -100), (300, 2, -100), (300, 7, 5)])
def test_ignored_targets(vocab_size, chunk_rows, ignore_index):
    kernel_checks.check_ignored_targets(9, vocab_size, chunk_rows, ignore_index, FLOAT32, "cpu")


@pytest.mark.parametrize("dtype", [FLOAT32, FLOAT16])
def test_adamw(dtype):
    kernel_checks.check_adamw([2500, 1, 4096, 77], dtype, "cpu")


@pytest.mark.parametrize(
    ("shape", "dtype"), [((2, 40, 70), FLOAT32), ((1, 64, 32), FLOAT32), ((2, 33, 65), FLOAT16), ((1, 1, 3), BFLOAT16)]
)
def test_symmetric_product(shape, dtype):
    kernel_checks.check_symmetric_product(shape, dtype, "cpu")


@pytest.mark.parametrize(("shape", "count"), [((8, 12), 17), ((1, 5), 2), ((40, 60), 1)])
@pytest.mark.parametrize("dtype", [FLOAT32, FLOAT16])
def test_muon(shape, count, dtype):
    kernel_checks.check_muon(shape, count, dtype, "cpu")


@pytest.mark.parametrize("shape", [(3, 7), (48, 32), (130, 80)])
def test_quantizing_to_8_bits(shape):
    fp8_checks.check_quantizing(shape, "cpu")


@pytest.mark.parametrize(("tokens", "d_in", "d_outs"), [(32, 16, (16,)), (160, 48, (32, 16, 16))])
def test_linear_in_fp8(tokens, d_in, d_outs):
    fp8_checks.check_linear(tokens, d_in, d_outs, "cpu")


def test_swiglu_in_fp8():
    fp8_checks.check_swiglu(48, 32, 80, "cpu")


def test_unusual_tensors_are_named():
    fp8_checks.check_unusual_tensors_are_named("cpu")


@pytest.mark.parametrize(
    ("settings", "changes"),
    [({}, {}), ({"gradient_accumulation": 2, "optimizer": "muon"}, {"ffn": "relu2", "num_kv_heads": 1})],
)
def test_training_steps_in_fp8(settings, changes):
    """Against the steps in bfloat16: the losses are near, and all matrices of the blocks are multiplied in 8 bits."""
    sizes: dict[str, Any] = {"vocab_size": 37, "context_length": 16, "d_model": 32, "num_layers": 1, "num_heads": 2}
    losses = []
    torch.manual_seed(0)
    ids = torch.randint(37, (2, 2, 17))
    for precision in ("bfloat16", "fp8"):
        torch.manual_seed(0)
        model = TransformerLM(ModelConfig(**sizes, d_ff=48, **changes))
        model.activation_dtype = BFLOAT16
        config = TrainConfig(steps=1, batch_size=2, cuda_graph=False, precision=precision, **settings)
        with dispatch.use_operators(operators):
            step = TrainStep(model, make_optimizer(model, config), config, torch.device("cpu"))
            losses.append([step((batch[:, :-1], batch[:, 1:]), 1e-2)[0].item() for batch in ids])
    print(losses)
    assert losses[0] == pytest.approx(losses[1], rel=1e-2)
    assert losses[0] != losses[1]
    assert list(step.fp8.matrices) == [
        f"layers.0.{name}" for name in ("attn.qkv", "attn.output_proj", "ffn.in", "ffn.w2")
    ]
    assert step.take_unusual() == []


def take_fp8_steps(world: World, folder: Path) -> None:
    """Two steps; with several ranks also one in which the last rank's loss is NaN, and the second one again, resumed.

    Saves the losses, the weights, and the scales after the first step.
    """
    torch.set_num_threads(1)
    torch.manual_seed(world.rank)  # all get the weights of rank 0
    sizes: dict[str, Any] = {"vocab_size": 37, "context_length": 16, "d_model": 32, "num_layers": 1, "num_heads": 2}
    model = TransformerLM(ModelConfig(**sizes, d_ff=48))
    model.activation_dtype = BFLOAT16
    # float32: to bfloat16, the interpreter does not round as torch does.
    settings: dict[str, Any] = {"cuda_graph": False, "reduce_precision": "float32"}
    config = TrainConfig(steps=1, batch_size=2, precision="fp8", **settings)
    ids = torch.randint(37, (3, 2, 17), generator=torch.Generator().manual_seed(0))

    def make_step() -> TrainStep:
        return TrainStep(model, make_optimizer(model, config), config, torch.device("cpu"), world)

    def loss_of(step: TrainStep, number: int) -> float:
        batch = ids[number, slice(None) if world.size == 1 else [world.rank]]
        return step((batch[:, :-1], batch[:, 1:]), 1e-2)[0].item()

    def weights() -> dict[str, torch.Tensor]:
        return copy.deepcopy(model.state_dict())

    with dispatch.use_operators(operators):
        step = make_step()
        losses = [loss_of(step, 0)]
        saved = weights(), copy.deepcopy(step.optimizer.state_dict()), step.fp8_scales
        losses.append(loss_of(step, 1))
        final = weights()
        if world.size > 1:
            loss_fn: Any = step.loss_fn
            step.loss_fn = cast(Any, lambda *batch: loss_fn(*batch) * (math.nan if world.rank else 1))
            assert math.isnan(loss_of(step, 2))
            assert all(map(torch.equal, weights().values(), final.values()))
            assert "layers.0.ffn.w2 (gradient) was not finite in 1 steps" in step.take_unusual()
            model.load_state_dict(saved[0])
            step = make_step()
            step.optimizer.load_state_dict(saved[1])
            step.fp8_scales = saved[2]
            assert loss_of(step, 1) == losses[1]
            assert all(map(torch.equal, weights().values(), final.values()))
    torch.save((losses, final, saved[2]), folder / f"{world.size}_{world.rank}.pt")


def test_ranks_train_in_fp8_as_one_process_does(tmp_path):
    def run_rank(environment: dict[str, str]) -> None:
        os.environ.update(environment)
        with join_world(os.environ) as world:
            take_fp8_steps(world, tmp_path)

    forks = [run_in_fork(run_rank, environment) for environment in ranks_tools.environments(2)]
    take_fp8_steps(SINGLE_PROCESS, tmp_path)
    assert [exit_status(fork) for fork in forks] == [0, 0]
    one, first, second = (torch.load(tmp_path / f"{name}.pt") for name in ("1_0", "2_0", "2_1"))
    print(one[0], first[0])
    assert first[0] == second[0] == pytest.approx(one[0], rel=3e-3)
    assert all(map(torch.equal, first[1].values(), second[1].values()))
    assert first[2] == second[2] == one[2]


def test_registrations():
    kernel_checks.check_registrations(FLOAT32, "cpu")


@pytest.mark.parametrize(
    ("prompt_lengths", "dtype", "changes"),
    [
        ([1], FLOAT32, {}),
        ([1], FLOAT16, {}),
        ([3, 1, 5, 2, 2], FLOAT32, {}),
        ([1], FLOAT32, {"num_heads": 4, "num_kv_heads": 2, "tied_embeddings": True}),
        ([3, 4, 5], FLOAT32, {"num_heads": 4, "num_kv_heads": 1}),
        ([6], FLOAT32, {"head_dim": 10, "qkv_bias": True, "qk_norm": True, "sliding_window": 3}),
        ([3, 1, 5], FLOAT16, {"num_heads": 2, "num_kv_heads": 1, "head_dim": 32, "qkv_bias": True, "qk_norm": True}),
        ([1], FLOAT32, MODERN | {"num_heads": 4, "num_kv_heads": 2, "num_layers": 2}),
        ([3, 4, 3, 4, 3], FLOAT32, MODERN | {"qkv_bias": True}),
        ([6], FLOAT32, {"ffn": "silu", "sliding_window": 3, "window_pattern": "SL", "num_layers": 2}),
    ],
)
def test_decoder(prompt_lengths, dtype, changes):
    # Few programs with much work each, because the interpreter runs one after the other.
    options = {"tiles": lambda n, k, rows: (32, 64 if rows <= 4 else 32, 1), "splits": 2}
    sizes: dict[str, Any] = dict(vocab_size=37, context_length=12, d_model=48, num_layers=1, num_heads=3, d_ff=60)
    config = ModelConfig(**(sizes | changes))
    kernel_checks.check_decoder(config, prompt_lengths, 5, dtype, "cpu", **options)


def test_decoder_of_more_sequences_than_a_program_multiplies(monkeypatch):
    monkeypatch.setattr(gpu_decoder, "_MAX_ROWS", 16)
    options = {"tiles": lambda n, k, rows: (64, 32, 1), "splits": 1}
    config = ModelConfig(vocab_size=37, context_length=12, d_model=32, num_layers=1, num_heads=1, d_ff=48)
    kernel_checks.check_decoder(config, [1] * 17, 2, FLOAT32, "cpu", **options)


@pytest.mark.parametrize("window", [1, 65, 100])
def test_decoder_skips_the_keys_before_a_window(window):
    """Blocks have 64 keys."""
    sizes: dict[str, Any] = dict(vocab_size=37, context_length=300, d_model=16, num_layers=1, num_heads=1, d_ff=16)
    options = {"tiles": lambda n, k, batch: (32, 64, 1), "splits": 2}
    config = ModelConfig(**(sizes | {"sliding_window": window}))
    kernel_checks.check_decoder(config, [190], 5, FLOAT32, "cpu", **options)


def test_a_restarted_decoder_has_the_new_weights():
    config = ModelConfig(vocab_size=37, context_length=12, d_model=32, num_layers=1, num_heads=2, d_ff=48, **MODERN)
    options = {"tiles": lambda n, k, rows: (32, 64 if rows <= 4 else 32, 1), "splits": 2}
    kernel_checks.check_restarted_decoder(config, FLOAT32, "cpu", **options)


def test_a_second_call_of_generate_takes_the_decoder_of_the_first_with_the_new_weights(monkeypatch):
    monkeypatch.setattr(gpu_decoder, "choose_tiles", lambda n, k, batch: (32, 64, 1))
    monkeypatch.setattr(gpu_decoder, "choose_splits", lambda heads: 2)
    torch.manual_seed(0)
    config = ModelConfig(vocab_size=37, context_length=12, d_model=32, num_layers=1, num_heads=2, d_ff=48)
    model = TransformerLM(config)
    torch.nn.init.normal_(model.lm_head.weight)
    model.activation_dtype = FLOAT16
    kept = []
    with dispatch.use_operators(operators):
        for prompts in ([[3]], [[4]], [[5], [6]]):
            model.lm_head.weight.detach().copy_(model.lm_head.weight.roll(7, 0))
            ids = continuation.generate(model, prompts, 1, temperature=0.0)
            assert ids == continuation.generate(model, prompts, 1, temperature=0.0, use_cache=False)
            kept.append(gpu_decoder.idle_decoders[model])
    assert kept[0] is kept[1]
    assert kept[1] is not kept[2]  # two sequences


def test_decoder_finds_nan():
    options = {"tiles": lambda n, k, rows: (32, 64 if rows <= 4 else 32, 1), "splits": 2}
    kernel_checks.check_decoder_finds_nan(FLOAT32, "cpu", **options)


@pytest.mark.parametrize("bad_target", [-1, 37])
def test_a_step_with_a_bad_target_changes_nothing(bad_target):
    """The kernel cannot raise an error; the loss is NaN, which the training loop reports."""
    config = ModelConfig(vocab_size=37, context_length=12, d_model=32, num_layers=1, num_heads=2, d_ff=48)
    model = TransformerLM(config)
    model.activation_dtype = FLOAT16
    before = copy.deepcopy(model.state_dict())
    ids = torch.randint(37, (2, 13))
    ids[1, -1] = bad_target
    settings = TrainConfig(steps=1, batch_size=2, cuda_graph=False)
    with dispatch.use_operators(operators):
        step = TrainStep(model, make_optimizer(model, settings), settings, torch.device("cpu"))
        loss, _ = step((ids[:, :-1], ids[:, 1:]), 1e-2)
    assert loss.isnan()
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, before[name])


@pytest.mark.parametrize(("optimizer", "changes"), [("adamw", {}), ("muon", {}), ("muon", MODERN)])
def test_a_training_step(optimizer, changes):
    """All kernels in three steps, with half-precision copies of the matrices, against the steps without kernels."""
    sizes: dict[str, Any] = dict(vocab_size=37, context_length=12, d_model=32, num_layers=2, num_heads=2, d_ff=48)
    torch.manual_seed(0)
    models = [TransformerLM(ModelConfig(**sizes, **changes))]
    models.append(copy.deepcopy(models[0]))
    before = torch.cat([parameter.detach().flatten() for parameter in models[0].parameters()])
    settings = TrainConfig(steps=1, batch_size=2, cuda_graph=False, max_gradient_norm=0.5, optimizer=optimizer)
    ids = torch.randint(37, (3, 2, 13))
    results = []
    attention_backward = flash_attention.backward
    for model, kernels in zip(models, (operators, None), strict=True):
        model.activation_dtype = FLOAT16
        calls: list[str] = []
        with (
            pytest.MonkeyPatch.context() as patch,
            dispatch.use_operators(kernels),
            dispatch.before_attention_gradients(lambda c=calls: c.append("callback")),
        ):
            patch.setattr(
                flash_attention, "backward", lambda *a, c=calls: (c.append("kernels"), attention_backward(*a))
            )
            step = TrainStep(model, make_optimizer(model, settings), settings, torch.device("cpu"))
            results.append([step((sequences[:, :-1], sequences[:, 1:]), 1e-2) for sequences in ids])
        assert len(step.weight_copies) == sum(type(module) is Linear for module in model.modules())
        assert calls == (3 * 2 * ["callback", "kernels"] if kernels else [])
        for parameter, half in step.weight_copies.items():
            torch.testing.assert_close(half, parameter.half(), rtol=1e-3, atol=1e-6)
        steps = {int(state["step"]) for state in step.optimizer.state.values() if "step" in state}
        assert steps == {3}
    torch.testing.assert_close(results[0], results[1], rtol=2e-3, atol=1e-4)
    ours, plain = (torch.cat([p.detach().flatten() for p in model.parameters()]) for model in models)
    error = ((ours - plain).norm() / (plain - before).norm()).item()
    print("relative error of the weights' change", error)
    assert error < 0.1  # AdamW's steps are as large for gradients that consist of rounding errors
