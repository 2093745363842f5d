"""One optimizer step, compared with the plain one: forward, backward, clip, AdamW."""

import copy
from collections.abc import Iterator
from functools import partial
from typing import Any

import jaxtyping
import pytest
import torch
import torch._dynamo.exc
from torch._decomp import core_aten_decompositions
from torch._functorch.aot_autograd import aot_module
from torch._functorch.compilers import nop
from torch._functorch.partitioners import min_cut_rematerialization_partition

from basic.model import ModelConfig, TransformerLM, clip_gradients
from basic.training import step as step_module
from basic.training.loop import make_optimizer
from basic.training.parallel.world import World
from basic.training.settings import MuonConfig, TrainConfig
from basic.training.step import KeepSums, TrainStep, compile_segments, model_segments

SIZES: dict[str, Any] = {"vocab_size": 30, "context_length": 12, "d_model": 16, "num_layers": 3, "num_heads": 4}


class SilentWorld(World):
    """A world without communication."""

    def broadcast_weights(self, model):
        pass


def batches(count: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    ids = torch.randint(30, (count, 4, 13))
    return [(sequences[:, :-1], sequences[:, 1:]) for sequences in ids]


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
@pytest.mark.parametrize("optimizer_name", ["adamw", "muon"])
def test_a_step_equals_the_plain_one(shape, precision, optimizer_name):
    """Also with bfloat16 copies of the matrices, and bfloat16 gradients."""
    torch.manual_seed(0)
    model = TransformerLM(ModelConfig(**SIZES, **shape))
    model.activation_dtype = precision
    plain = copy.deepcopy(model)
    # Whether a weight decays changes with the sign of its update, which may be a rounding error.
    muon = MuonConfig(cautious=False)
    settings = TrainConfig(steps=1, batch_size=4, max_gradient_norm=0.5, optimizer=optimizer_name, muon=muon)
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
        for (name, parameter), other in zip(model.named_parameters(), plain.parameters(), strict=True):
            # Muon multiplies small singular values, and with them rounding errors, by up to a thousand.
            tolerance = 1e-7 if optimizer_name == "adamw" else 1e-6
            torch.testing.assert_close(parameter, other, rtol=1e-6, atol=tolerance, msg=name)
        assert step.loss_fn(*batch) == model.loss(*batch)  # the copies are updated too
        plain.load_state_dict(model.state_dict())


@pytest.mark.parametrize("tied", [False, True])
def test_groups_of_parameters(tied):
    """AdamW's groups are those of checkpoints of earlier versions; Muon's hold only matrices of the blocks."""
    model = TransformerLM(ModelConfig(**SIZES, tied_embeddings=tied))
    names = {parameter: name for name, parameter in model.named_parameters()}
    ends = [name for name in names.values() if name in ("token_embeddings.weight", "lm_head.weight")]
    others = [name for name in names.values() if name not in ends]
    gains = [name for name in others if "ln" in name]
    matrices = [name for name in others if "ln" not in name]

    def groups(**settings: Any) -> list[tuple]:
        optimizer = make_optimizer(model, TrainConfig(steps=1, weight_decay=0.2, **settings))
        keys = ("rule", "rate_factor", "weight_decay")
        return [
            (*(group[key] for key in keys), [names[p] for p in group["params"]]) for group in optimizer.param_groups
        ]

    assert len(ends) == 2 - tied
    assert groups() == [("adamw", 1.0, 0.2, others), ("adamw", 1.0, 0.2, ends)]
    assert groups(embedding_rate_factor=5.0)[1] == ("adamw", 5.0, 0.2, ends)
    settings: dict[str, Any] = {"optimizer": "muon", "embedding_rate_factor": 15.0, "head_rate_factor": 0.2}
    found = groups(**settings)
    assert [("muon", 1.0, 0.2, matrices), ("adamw", 1.0, 0.0, gains)] == sorted(found[:2], reverse=True)
    assert found[2:] == [("adamw", factor, 0.0, [name]) for factor, name in zip((15.0, 0.2), ends, strict=False)]
    assert groups(**settings, other_weight_decay=0.3)[-1][2] == 0.3
    assert groups(**settings, head_weight_decay=0.5)[-1][2] == (0.0 if tied else 0.5)


def test_momentum_and_weight_decay_change_from_step_to_step():
    torch.manual_seed(0)
    model = TransformerLM(ModelConfig(**SIZES))
    settings = TrainConfig(steps=1, batch_size=4, optimizer="muon", weight_decay_schedule="linear", weight_decay=0.5)
    step = TrainStep(model, make_optimizer(model, settings), settings, torch.device("cpu"))
    weight = dict(model.named_parameters())["layers.0.attn.q_proj.weight"]
    step(batches(1)[0], 0.0, 0.25, 0.5)
    first = step.optimizer.state[weight]["momentum"].clone()
    torch.testing.assert_close(first, 0.75 * clipped_gradient(step, weight))
    step(batches(1)[0], 0.1, 0.0, 0.5)
    torch.testing.assert_close(step.optimizer.state[weight]["momentum"], clipped_gradient(step, weight))
    decays = {group["rule"]: float(group["weight_decay"]) for group in step.optimizer.param_groups}
    assert decays == {"muon": 0.25, "adamw": 0.0}


def clipped_gradient(step: TrainStep, weight: torch.Tensor) -> torch.Tensor:
    norm = torch.stack([p.grad.norm() for p in step.parameters if p.grad is not None]).norm()
    assert weight.grad is not None
    return weight.grad * (1 / (norm + 1e-6)).clamp(max=1)


def test_gradients_of_micro_batches_are_summed_in_float32():
    torch.manual_seed(0)
    model = TransformerLM(ModelConfig(**SIZES))
    model.activation_dtype = torch.bfloat16
    settings = TrainConfig(steps=1, batch_size=4, gradient_accumulation=2)
    step = TrainStep(model, make_optimizer(model, settings), settings, torch.device("cpu"))
    step(batches(1)[0], 1e-2)
    assert {parameter.grad.dtype for parameter in step.parameters if parameter.grad is not None} == {torch.float32}


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", [1, 2])
def test_compiling_leaves_the_original_model_unchanged(monkeypatch, precision, size):
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    model = TransformerLM(ModelConfig(**SIZES))
    model.activation_dtype = precision
    settings = TrainConfig(steps=1, batch_size=4, compile=True)
    names = set(model.state_dict())
    TrainStep(model, make_optimizer(model, settings), settings, torch.device("cpu"), SilentWorld(0, size))
    assert set(model.state_dict()) == names
    assert not any({"forward", "_embed"} & set(vars(module)) for module in model.modules())
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


@pytest.mark.parametrize(
    ("changes", "sizes"), [({}, [1, 9, 9, 9, 30]), ({"value_embeddings": True}, [1, 11, 9, 11, 34])]
)
def test_segments_contain_all_parameters_and_compute_the_same(changes, sizes, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    torch.manual_seed(0)
    model = TransformerLM(ModelConfig(**SIZES, **changes))
    compiled = copy.deepcopy(model)
    batch = batches(1)[0]
    compile_segments(compiled)
    segments = model_segments(compiled)
    assert [len(list(segment.parameters())) for segment in segments] == sizes
    assert segments[-1] is compiled
    assert compiled.loss(*batch) == model.loss(*batch)


@pytest.fixture
def graphs(monkeypatch) -> Iterator[list[torch.fx.GraphModule]]:
    """Lists the graphs that torch.compile makes, which run as they are."""
    made: list[torch.fx.GraphModule] = []

    def keep(graph: torch.fx.GraphModule, _inputs: list) -> Any:
        made.append(graph)
        return graph.forward

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=keep))
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # torch.compile cannot trace checks of shapes
    with torch._dynamo.config.patch(recompile_limit=torch._dynamo.config.recompile_limit):
        yield made


def test_the_sum_in_the_middle_of_a_block_is_kept_for_the_backward_pass(monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # torch.compile cannot trace checks of shapes
    counts = {}
    for keeps in (False, True):

        def partition(graph: torch.fx.GraphModule, inputs: Any, keeps: bool = keeps, **options: Any) -> Any:
            if keeps:
                KeepSums()(graph.graph)
            forward, backward = min_cut_rematerialization_partition(graph, inputs, **options)
            counts[keeps] = [node.target for node in backward.graph.nodes].count(torch.ops.aten.add.Tensor)
            return forward, backward

        block = TransformerLM(ModelConfig(**SIZES)).layers[0].bfloat16()
        x = torch.randn(2, 8, 16, dtype=torch.bfloat16, requires_grad=True)
        compiled = aot_module(block, nop, partition_fn=partition, decompositions=core_aten_decompositions())
        compiled(x).sum().backward()
    assert counts[True] == counts[False] - 1


def test_equal_blocks_are_compiled_once(graphs):
    torch.manual_seed(0)
    sizes: dict[str, Any] = SIZES | {"num_layers": 4, "window_pattern": "SSLS", "sliding_window": 4}
    model = TransformerLM(ModelConfig(**sizes))
    settings = TrainConfig(steps=1, batch_size=4, compile=True, activation_checkpointing=True)
    model.configure_training(activation_checkpointing=True)
    step = TrainStep(model, make_optimizer(model, settings), settings, torch.device("cpu"))
    for batch in batches(2):
        expected = model.loss(*batch)
        torch.testing.assert_close(step(batch, 1e-2)[0], expected)
        assert len(graphs) == 4  # embedding, two kinds of blocks, loss
    with torch.no_grad():
        torch.testing.assert_close(step.loss_fn(*batch), model.loss(*batch))
    assert len(graphs) == 8


def test_models_of_one_process_share_no_limit_of_versions(graphs, monkeypatch):
    """Nor does a model that has too many versions of its own run uncompiled in silence."""
    monkeypatch.setattr(step_module, "_MAX_VERSIONS", 1)
    settings = TrainConfig(steps=1, batch_size=4, compile=True)

    def loss_fn(**changes: Any) -> Any:
        model = TransformerLM(ModelConfig(**{**SIZES, **changes}))
        return TrainStep(model, make_optimizer(model, settings), settings, torch.device("cpu")).loss_fn

    with torch._dynamo.config.patch(recompile_limit=1):
        for width in (8, 16):
            loss_fn(d_model=width)(*batches(1)[0])
        assert len(graphs) == 6
        with pytest.raises(torch._dynamo.exc.FailOnRecompileLimitHit):
            loss_fn(window_pattern="SSL", sliding_window=4)(*batches(1)[0])
