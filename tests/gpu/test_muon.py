"""Muon on a GPU: in bfloat16, inside a captured graph, and with copies of the matrices, beside its plain form."""

from __future__ import annotations

import copy
import math

import pytest
import torch

pytest.importorskip("triton", reason="needs Triton")
if not torch.cuda.is_available():
    pytest.skip("needs a GPU", allow_module_level=True)

from basic.model import ModelConfig, TransformerLM
from basic.training.settings import TrainConfig
from basic.training.step import TrainStep, make_optimizer
from basic.transformer.muon import orthogonalize, polynomials
from tests.helpers import kernel_checks

CUDA = torch.device("cuda")


@pytest.mark.parametrize("shape", [(3, 512, 512), (2, 1344, 512), (2, 512, 1344), (1, 100, 70)])
@pytest.mark.parametrize("name", ["polar_express", "newton_schulz"])
def test_orthogonalization_in_bfloat16(shape, name):
    torch.manual_seed(0)
    matrices = torch.randn(shape)
    expected = orthogonalize(matrices.double(), polynomials(name, 5))
    result = orthogonalize(matrices.cuda(), polynomials(name, 5))
    assert result.dtype == torch.bfloat16
    error = (result.cpu().double() - expected).norm() / expected.norm()
    print("relative error", error.item())
    assert error < 0.05


@pytest.mark.parametrize("shape", [(8, 512, 512), (3, 512, 1344), (2, 200, 77), (1, 2048, 5632)])
def test_symmetric_product(shape):
    kernel_checks.check_symmetric_product(shape, torch.bfloat16, "cuda")


@pytest.mark.parametrize(("shape", "count"), [((512, 1344), 20), ((77, 3), 2), ((2048, 5632), 3)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_both_passes(shape, count, dtype):
    kernel_checks.check_muon(shape, count, dtype, "cuda")


def test_a_captured_step_is_the_step_without_a_graph():
    config = ModelConfig(vocab_size=1000, context_length=128, d_model=256, num_layers=2, num_heads=4)
    torch.manual_seed(0)
    models = [TransformerLM(config).to(CUDA)]
    models.append(copy.deepcopy(models[0]))
    before = torch.cat([parameter.detach().flatten() for parameter in models[0].parameters()])
    ids = torch.randint(1000, (8, 4, 129), device=CUDA)
    steps = []
    for model, cuda_graph in zip(models, (True, False), strict=True):
        model.activation_dtype = torch.bfloat16
        settings = TrainConfig(
            steps=8, batch_size=4, optimizer="muon", cuda_graph=cuda_graph, weight_decay_schedule="linear"
        )
        steps.append(TrainStep(model, make_optimizer(model, settings), settings, CUDA))
        for number, sequences in enumerate(ids):
            # Rate, momentum and decay change from step to step, also in the graph.
            step = 0.02 / (number + 1), 0.8 + 0.02 * number, 1 - number / 8
            steps[-1]((sequences[:, :-1].contiguous(), sequences[:, 1:].contiguous()), *step)
    assert steps[0].graph is not None
    captured, plain = (torch.cat([p.detach().flatten() for p in model.parameters()]) for model in models)
    error = ((captured - plain).norm() / (plain - before).norm()).item()
    print("relative error of the weights' change", error)
    assert error < 0.1  # gradients of the embedding are added up in any order
    for parameter, low in steps[0].weight_copies.items():
        assert torch.equal(low, parameter.bfloat16())

    # A loss that is not finite changes nothing: a weight that is NaN makes it so.
    model, step = models[0], steps[0]
    gain = dict(model.named_parameters())["ln_final.weight"]
    with torch.no_grad():
        gain[0] = math.nan
    unchanged = [parameter.clone() for parameter in model.parameters()]
    step((ids[0, :, :-1].contiguous(), ids[0, :, 1:].contiguous()), 0.1)
    for parameter, old in zip(model.parameters(), unchanged, strict=True):
        assert torch.equal(parameter.nan_to_num(7), old.nan_to_num(7))
