"""One optimizer step against the plain one: forward, backward, clip, AdamW."""

import copy
from typing import Any

import pytest
import torch

from basic.model import ModelConfig, TransformerLM, clip_gradients
from basic.training.loop import make_optimizer
from basic.training.parallel.world import World
from basic.training.settings import TrainConfig
from basic.training.step import TrainStep, compile_segments, model_segments

SIZES: dict[str, Any] = {"vocab_size": 30, "context_length": 12, "d_model": 16, "num_layers": 3, "num_heads": 4}


def batches(count: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    ids = torch.randint(30, (count, 4, 13))
    return [(rows[:, :-1], rows[:, 1:]) for rows in ids]


@pytest.mark.parametrize(
    "shape",
    [
        {},
        {"tied_embeddings": True},
        {"num_kv_heads": 2, "positions": "none"},
        {"ffn": "silu", "norm": "post"},
        {"norm": "none"},
    ],
    ids=str,
)
@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16], ids=str)
def test_a_step_is_the_plain_one(shape, precision):
    """Also where it computes with copies of the matrices, and their gradients, in half precision."""
    torch.manual_seed(0)
    model = TransformerLM(ModelConfig(**SIZES, **shape))
    model.activation_dtype = precision
    plain = copy.deepcopy(model)
    settings = TrainConfig(steps=1, batch_size=4, max_gradient_norm=0.5)
    optimizer, plain_optimizer = make_optimizer(model, settings), make_optimizer(plain, settings)
    step = TrainStep(model, optimizer, settings, torch.device("cpu"))
    assert len(step.weight_copies) == (
        0 if precision == torch.float32 else len([p for p in model.parameters() if p.ndim == 2]) - 1
    )
    for batch in batches(5):
        loss, norm = step(batch, 1e-2)
        plain_optimizer.zero_grad()
        expected = plain.loss(*batch)
        expected.backward()
        expected_norm = clip_gradients(plain.parameters(), settings.max_gradient_norm)
        for group in plain_optimizer.param_groups:
            group["lr"] = 1e-2 * group["rate_factor"]
        plain_optimizer.step()
        assert loss == expected
        torch.testing.assert_close(norm, expected_norm, rtol=1e-6, atol=0)
        for (name, own), other in zip(model.named_parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(own, other, rtol=1e-6, atol=1e-7, msg=name)
        assert step.loss_fn(*batch) == model.loss(*batch)  # the copies have followed
        plain.load_state_dict(model.state_dict())


def test_gradients_of_several_parts_are_added_up_in_full_precision():
    torch.manual_seed(0)
    model = TransformerLM(ModelConfig(**SIZES))
    model.activation_dtype = torch.bfloat16
    settings = TrainConfig(steps=1, batch_size=4, gradient_accumulation=2)
    step = TrainStep(model, make_optimizer(model, settings), settings, torch.device("cpu"))
    step(batches(1)[0], 1e-2)
    assert {parameter.grad.dtype for parameter in step.parameters if parameter.grad is not None} == {torch.float32}


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", [1, 2])
def test_compiling_leaves_the_callers_model_alone(monkeypatch, precision, size):
    monkeypatch.setattr(torch, "compile", lambda function: function)
    monkeypatch.setattr(World, "broadcast_weights", lambda world, model: None)
    model = TransformerLM(ModelConfig(**SIZES))
    model.activation_dtype = precision
    settings = TrainConfig(steps=1, batch_size=4, compile=True)
    names = set(model.state_dict())
    TrainStep(model, make_optimizer(model, settings), settings, torch.device("cpu"), World(0, size))
    assert set(model.state_dict()) == names
    assert not any("forward" in vars(module) for module in model.modules())
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


def test_pieces_are_the_whole_model(monkeypatch):
    """What travels piece by piece: every parameter is in one of them, also when the blocks do not come out even."""
    monkeypatch.setattr(torch, "compile", lambda function: function)
    torch.manual_seed(0)
    model = TransformerLM(ModelConfig(**SIZES))
    pieces = copy.deepcopy(model)
    batch = batches(1)[0]
    compile_segments(pieces)
    found = model_segments(pieces)
    assert [len(list(piece.parameters())) for piece in found] == [1, 18, 9, 30]
    assert found[-1] is pieces
    assert pieces.loss(*batch) == model.loss(*batch)
