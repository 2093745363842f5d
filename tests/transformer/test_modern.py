"""The settings of the architecture that Llama does not have, against formulas written out here."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from basic.common.errors import InvalidInputError
from basic.formats.hf_names import hf_config
from basic.model import KVCache, ModelConfig, TransformerLM
from basic.training.settings import TrainConfig
from basic.training.step import make_optimizer
from basic.transformer.functional import rms_norm, rope_tables, rotate_pairs

SIZES: dict[str, Any] = dict(vocab_size=50, context_length=16, d_model=32, num_layers=3, num_heads=4, d_ff=48)
ALL: dict[str, Any] = {"ffn": "relu2", "qk_norm": True, "embedding_norm": True, "value_embeddings": True}


def make_model(**changes) -> TransformerLM:
    """A model in float64 all of whose parameters are random."""
    torch.manual_seed(0)
    model = TransformerLM(ModelConfig(**SIZES, **changes)).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    return model


def norm(x: Tensor, gain: Tensor | float = 1.0) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * gain


def logits_by_hand(model: TransformerLM, ids: list[int]) -> Tensor:
    """The logits of one sequence, a head and a position at a time."""
    weights, heads, d = model.state_dict(), 4, 8
    cos, sin = rope_tables(1e4, d, 16, dtype=torch.float64)
    x = norm(weights["token_embeddings.weight"][ids])
    for i in range(3):
        own = {name.removeprefix(f"layers.{i}."): weight for name, weight in weights.items()}
        normed, attended = norm(x, own["ln1.weight"]), torch.zeros(len(ids), 32, dtype=torch.float64)
        for head in range(heads):
            rows = slice(head * d, (head + 1) * d)
            q, k, v = (normed @ own[f"attn.{name}_proj.weight"][rows].T for name in "qkv")
            q, k = norm(q, own["attn.q_norm.weight"]), norm(k, own["attn.k_norm.weight"])
            q, k = (rotate_pairs(y, cos[: len(ids)], sin[: len(ids)]) for y in (q, k))
            if i in (0, 2):
                gate = 2 / (1 + (-normed[:, :32] @ own["attn.value_gate.weight"][head]).exp())
                v = v + gate[:, None] * own["attn.value_embeddings.weight"][ids][:, rows]
            for position in range(len(ids)):
                scores = (k[: position + 1] @ q[position] / math.sqrt(d)).exp()
                attended[position, rows] = scores @ v[: position + 1] / scores.sum()
        x = x + attended @ own["attn.output_proj.weight"].T
        hidden = norm(x, own["ln2.weight"]) @ own["ffn.w1.weight"].T
        x = x + torch.where(hidden > 0, hidden**2, 0) @ own["ffn.w2.weight"].T
    return norm(x, weights["ln_final.weight"]) @ weights["lm_head.weight"].T


def test_all_settings_together_are_their_formulas():
    model, ids = make_model(**ALL), torch.randint(50, (2, 9))
    with torch.no_grad():
        logits = model(ids)
        expected = torch.stack([logits_by_hand(model, sequence.tolist()) for sequence in ids])
        assert torch.allclose(logits, expected, rtol=1e-9, atol=1e-9)
        losses = -expected[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None])
        assert math.isclose(model.loss(ids[:, :-1], ids[:, 1:]).item(), losses.mean().item(), rel_tol=1e-9)


@pytest.mark.parametrize("name", ["qk_norm", *(name for name in ALL if name not in ("ffn", "qk_norm"))])
def test_each_setting_alone_changes_the_result_and_receives_gradients(name):
    plain, model = make_model(), make_model(**{name: ALL[name]})
    ids = torch.randint(50, (2, 9))
    assert not torch.allclose(plain(ids), model(ids), atol=1e-3)
    model.loss(ids[:, :-1], ids[:, 1:]).backward()
    for parameter_name, parameter in model.named_parameters():
        assert parameter.grad is not None, parameter_name
        assert parameter.grad.abs().max() > 0, parameter_name


def test_decoding_with_a_cache_is_the_whole_sequence():
    model, ids = make_model(**ALL, num_kv_heads=2, sliding_window=5), torch.randint(50, (2, 12))
    with torch.no_grad():
        expected = model(ids)
        cache = KVCache(model.config, 2, dtype=torch.float64)
        parts = []
        for chunk in ids.split([7, 1, 1, 3], dim=1):
            parts.append(model(chunk, cache))
            cache.advance(chunk.shape[1])
    assert torch.allclose(torch.cat(parts, 1), expected, rtol=1e-9, atol=1e-9)


def test_zero_outputs_start_as_the_identity():
    torch.manual_seed(0)
    model = TransformerLM(ModelConfig(**SIZES, zero_outputs=True))
    ids = torch.randint(50, (4, 16))
    with torch.no_grad():
        assert torch.allclose(model.features(ids), rms_norm(model.token_embeddings(ids), torch.ones(32), 1e-5))
    model.loss(ids, ids).backward()
    gradient = model.get_parameter("layers.0.ffn.w2.weight").grad
    assert gradient is not None
    assert gradient.abs().max() > 0


def test_no_setting_draws_other_weights_than_before():
    """Runs with a seed stay the same, whatever settings exist."""
    torch.manual_seed(0)
    plain = TransformerLM(ModelConfig(**SIZES))
    torch.manual_seed(0)
    same = TransformerLM(ModelConfig(**SIZES, qk_norm=True, embedding_norm=True, zero_outputs=True))
    for name, weight in plain.state_dict().items():
        if not name.endswith(("output_proj.weight", "w2.weight")):
            assert torch.equal(weight, same.state_dict()[name]), name


def test_groups_of_the_optimizer():
    model = TransformerLM(ModelConfig(**SIZES, **ALL))
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    settings = TrainConfig(steps=1, optimizer="muon", embedding_rate_factor=15.0, head_rate_factor=0.2)
    groups = make_optimizer(model, settings).param_groups
    rule = {names[id(p)]: (group["rule"], group["rate_factor"]) for group in groups for p in group["params"]}
    assert rule["layers.0.attn.value_embeddings.weight"] == ("adamw", 15.0)
    assert rule["layers.0.attn.value_gate.weight"] == ("muon", 1.0)
    assert "layers.1.attn.value_embeddings.weight" not in rule
    assert rule.keys() == set(names.values())


def test_export_names_what_llama_does_not_have():
    config = ModelConfig(**SIZES, **ALL, sliding_window=4, window_pattern="SL")
    with pytest.raises(
        InvalidInputError, match="embedding_norm=True and value_embeddings=True and window_pattern='SL'"
    ):
        hf_config(config)
    assert ModelConfig(**SIZES).not_in_llama == []


def test_summary_does_not_count_embeddings_as_multiplied():
    summary = make_model(**ALL).summary()
    row = next(row for row in summary.rows if row.name.endswith("value_embeddings.weight"))
    assert (row.layers, row.parameters, row.flops_per_token) == (2, 2 * 50 * 32, 0)


def test_a_copy_is_the_same():
    model, ids = make_model(**ALL), torch.randint(50, (1, 5))
    assert torch.equal(copy.deepcopy(model)(ids), model(ids))
