"""Attention maps, compared with what the layers compute."""

from __future__ import annotations

from typing import Any, cast

import pytest
import torch

from basic.analysis.attention import attention_maps
from basic.common.errors import InvalidInputError
from basic.model import ModelConfig, TransformerLM


@pytest.mark.parametrize(
    "settings",
    [
        *({}, {"num_kv_heads": 1}, {"qk_norm": True, "qkv_bias": True}, {"positions": "none"}, {"sliding_window": 3}),
        {"qk_norm": "all_heads", "norm": "sublayer", "num_kv_heads": 2},
    ],
    ids=lambda settings: ",".join(settings) or "default",
)
def test_maps_times_values_are_what_each_layer_computes(settings: dict[str, Any]) -> None:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"vocab_size": 20, "context_length": 8, "d_model": 16, "num_layers": 2, "num_heads": 4}
    model = TransformerLM(ModelConfig(**sizes, **settings)).eval()
    for parameter in model.parameters():
        parameter.data += 0.2 * torch.randn_like(parameter)  # also biases, which begin with 0
    computed: list[tuple[torch.Tensor, torch.Tensor]] = []
    for block in model.layers:
        attn: Any = block.attn
        attn.register_forward_hook(lambda module, inputs, output: computed.append((module.v_proj(inputs[0]), output)))
    ids = torch.randint(20, (7,))
    maps = attention_maps(model, ids)
    assert maps.shape == (2, 4, 7, 7)
    torch.testing.assert_close(maps.sum(-1), torch.ones(2, 4, 7))
    assert (maps.triu(1) == 0).all()
    for layer, (values, output) in enumerate(computed[:2]):
        attn = cast(Any, model.layers[layer].attn)
        heads = values.view(7, attn.num_kv_heads, 4).transpose(0, 1).repeat_interleave(4 // attn.num_kv_heads, 0)
        attended = (maps[layer] @ heads).transpose(0, 1).reshape(1, 7, 16)
        torch.testing.assert_close(attn.output_proj(attended), output, rtol=1e-4, atol=1e-5)
    assert torch.equal(attention_maps(model, ids.tolist()), maps)
    with pytest.raises(InvalidInputError, match="no token to attend to"):
        attention_maps(model, [])
