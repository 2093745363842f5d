"""What Llama's relatives add: head size, biases, normalized queries and keys, sliding window, scaled RoPE."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.testing import assert_close

from basic.common.errors import InvalidConfigError
from basic.generation.continuation import generate
from basic.model import KVCache, ModelConfig, MultiHeadSelfAttention, RotaryPositionalEmbedding, TransformerLM
from basic.transformer import functional
from basic.transformer.attention import AttentionOptions
from basic.transformer.functional import rope_tables
from basic.transformer.kernels import dispatch
from tests.helpers.model_tools import assert_same, every_dtype, every_leading, float64, rotated, tiny

ALL: dict[str, Any] = {"head_dim": 6, "qkv_bias": True, "qk_norm": True, "sliding_window": 4, "num_kv_heads": 1}


def random_attention(dtype: torch.dtype, **changes: Any) -> MultiHeadSelfAttention:
    torch.manual_seed(0)
    attention = MultiHeadSelfAttention(16, 4, RotaryPositionalEmbedding(1e2, 6, 9), 2, head_dim=6, **changes)
    for parameter in attention.parameters():
        torch.nn.init.normal_(parameter, mean=0.5 if parameter.ndim == 1 else 0.0, std=0.3)
    return attention.to(dtype)


@every_dtype
@every_leading
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("norm_eps", [None, 0.1])
@pytest.mark.parametrize("window", [None, 1, 3, 20])
def test_attention_is_torchs(dtype: torch.dtype, leading: Any, bias: bool, norm_eps: float | None, window: Any) -> None:
    attention = random_attention(dtype, bias=bias, norm_eps=norm_eps, sliding_window=window)
    w = {name: parameter.detach().double() for name, parameter in attention.named_parameters()}
    assert w["q_proj.weight"].shape == (24, 16)
    assert ("q_proj.bias" in w, "k_norm.weight" in w) == (bias, norm_eps is not None)
    [(x, x64)] = float64(dtype, (*leading, 7, 16))

    def heads(name: str) -> Tensor:
        projected = F.linear(x64, w[f"{name}_proj.weight"], w.get(f"{name}_proj.bias"))
        return projected.unflatten(-1, (-1, 6)).transpose(-2, -3)

    q, k, v = (heads(name) for name in "qkv")
    if norm_eps is not None:
        q, k = (F.rms_norm(y, (6,), w[f"{n}_norm.weight"], norm_eps) for y, n in ((q, "q"), (k, "k")))
    q, k = (rotated(y, torch.arange(7), 1e2) for y in (q, k))
    distances = torch.arange(7)[:, None] - torch.arange(7)
    mask = (distances >= 0) & (distances < (window or 7))
    attended = F.scaled_dot_product_attention(q, k, v, mask, enable_gqa=True).transpose(-2, -3).flatten(-2)
    assert_same(attention(x), F.linear(attended, w["output_proj.weight"]), dtype)


PATTERN = {"sliding_window": 3, "window_pattern": "SL"}


@pytest.mark.parametrize(
    "changes", [ALL, PATTERN, {"sliding_window": 3, "num_kv_heads": 2}, {"rope_scaling": (2.0,)}], ids=str
)
def test_cached_decoding_gives_the_logits_of_a_full_pass(changes: dict[str, Any]) -> None:
    torch.manual_seed(0)
    model = TransformerLM(tiny(**changes)).double()
    ids = torch.randint(11, (2, 10))
    expected = model(ids)
    cache = KVCache(model.config, 2, dtype=torch.float64)
    parts = []
    for new in ids.split([4, 1, 1, 3, 1], dim=1):
        parts.append(model(new, cache))
        cache.advance(new.shape[1])
    assert_close(torch.cat(parts, 1), expected)
    prompt = ids[:1, :3].tolist()
    assert generate(model, prompt, 12, temperature=0) == generate(model, prompt, 12, temperature=0, use_cache=False)


def test_a_token_does_not_see_what_is_before_its_window() -> None:
    """With two layers a token sees 2 * (window - 1) tokens before it."""
    model = TransformerLM(tiny(sliding_window=3))
    ids = torch.randint(11, (1, 10))
    changed = ids.clone()
    changed[0, 2] = (ids[0, 2] + 1) % 11
    same = (model(ids) == model(changed)).all(-1)[0]
    assert same.tolist() == [True, True, *[False] * 5, True, True, True]


def test_a_pattern_gives_the_window_to_some_blocks() -> None:
    """The first and third blocks have the window, the second has not."""
    config = tiny(sliding_window=3, window_pattern="SL", num_layers=3)
    assert [config.window(layer) for layer in range(3)] == [3, None, 3]
    model = TransformerLM(config)
    ids = torch.randint(11, (1, 10))
    changed = ids.clone()
    changed[0, 0] = (ids[0, 0] + 1) % 11
    assert (model(ids) != model(changed)).any(-1).all()  # the second block sees the first token from everywhere
    short, long = (TransformerLM(tiny(sliding_window=window, num_layers=1)) for window in (3, None))
    head = 2 * model.lm_head.weight.numel()
    flops = 2 * (short.matmul_flops_per_token() - head) + long.matmul_flops_per_token()
    assert model.matmul_flops_per_token() == flops


def test_the_changed_heads_go_to_the_kernels() -> None:
    """A stand-in for the operators receives biased, normalized heads, and the window where it cuts something."""
    attention = random_attention(torch.float16, bias=True, norm_eps=0.1, sliding_window=3)
    expected = attention(x := torch.randn(2, 7, 16).half())
    windows = []

    class Operators:
        @staticmethod
        def rotary_attention(x, weight, cos, sin, num_heads, num_kv_heads, window, starts):
            assert weight is starts is None
            windows.append(window)
            identity = torch.eye(x.shape[-1], dtype=x.dtype)
            q, k, v = identity.split([6 * num_heads, 6 * num_kv_heads, 6 * num_kv_heads])
            options = AttentionOptions(num_heads=num_heads, rope=(cos, sin), window=window or None)
            attended = functional.causal_self_attention(x, q, k, v, options)
            return attended.unflatten(-1, (num_heads, -1)), None, None

    with dispatch.use_operators(Operators):
        assert_close(attention(x), expected, rtol=1e-2, atol=2e-3)
        attention(x[:, :3])
    assert windows == [3, 0]


# --- RoPE ---------------------------------------------------------------------------------------------------------


def test_linear_scaling_divides_the_positions() -> None:
    plain = rope_tables(1e4, 8, 5, dtype=torch.float64)
    scaled = rope_tables(1e4, 8, 17, (4.0,), dtype=torch.float64)
    for one, other in zip(plain, scaled, strict=True):
        assert_close(other[::4], one)


def test_llama_3_scaling_keeps_short_wavelengths_and_divides_long_ones() -> None:
    """Against the definition by wavelength, one pair at a time."""
    theta, d_k, scaling = 5e5, 64, (32.0, 1.0, 4.0, 8192.0)
    factor, low, high, context = scaling
    cos, sin = rope_tables(theta, d_k, 2, scaling, dtype=torch.float64)
    angles = torch.atan2(sin[1], cos[1])
    kinds = set()
    for pair in range(d_k // 2):
        frequency = theta ** (-2 * pair / d_k)
        wavelength = 2 * math.pi / frequency
        if wavelength < context / high:
            expected, kind = frequency, "short"
        elif wavelength > context / low:
            expected, kind = frequency / factor, "long"
        else:
            smooth, kind = (context / wavelength - low) / (high - low), "between"
            expected = (1 - smooth) * frequency / factor + smooth * frequency
        assert angles[pair].item() == pytest.approx(expected, rel=1e-12)
        kinds.add(kind)
    assert len(kinds) == 3


# --- Configuration ------------------------------------------------------------------------------------------------


def test_the_defaults_add_nothing() -> None:
    names = TransformerLM(tiny()).state_dict().keys()
    assert not [name for name in names if "bias" in name or "q_norm" in name or "k_norm" in name]


def test_names_and_shapes_of_the_new_weights() -> None:
    shapes = {name: tuple(w.shape) for name, w in TransformerLM(tiny(**ALL)).state_dict().items() if "0.attn" in name}
    kinds = {"q_proj": (12, 16), "k_proj": (6, 16), "v_proj": (6, 16), "output_proj": (16, 12)}
    expected: dict[str, tuple[int, ...]] = {f"layers.0.attn.{name}.weight": shape for name, shape in kinds.items()}
    expected |= {f"layers.0.attn.{name}.bias": kinds[name][:1] for name in ("q_proj", "k_proj", "v_proj")}
    assert shapes == expected | {f"layers.0.attn.{name}_norm.weight": (6,) for name in "qk"}


def test_head_dim_need_not_divide_anything_and_flops_count_the_window() -> None:
    model = TransformerLM(tiny(d_model=15, num_heads=2, head_dim=4, sliding_window=3))
    in_matrices = sum(w.numel() for name, w in model.named_parameters() if w.ndim == 2 and "token" not in name)
    assert model.matmul_flops_per_token() == 2 * in_matrices + 2 * 2 * 3 * 8 * 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"head_dim": 5}, "head_dim must be even, got 5"),
        ({"head_dim": 0}, "head_dim must be at least 1, got 0"),
        ({"sliding_window": 0}, "sliding_window must be at least 1, got 0"),
        ({"sliding_window": 3, "window_pattern": "SX"}, "the letters S .* got 'SX' with sliding_window=3"),
        ({"window_pattern": "SL"}, "needs sliding_window; got 'SL' with sliding_window=None"),
        ({"rope_scaling": (0.0,)}, r"rope_scaling must be .* got \(0.0,\)"),
        ({"rope_scaling": (8.0, 1.0)}, "rope_scaling must be empty, the divisor of all angles, or Llama 3's"),
        ({"rope_scaling": (8.0, 4.0, 1.0, 8192.0)}, "low < high"),
        ({"d_model": 15}, "or give head_dim"),
    ],
)
def test_values_out_of_range(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidConfigError, match=message):
        tiny(**changes)


def test_the_configuration_is_plain(tmp_path) -> None:
    from basic.common.config_files import load_config, save_config

    config = tiny(**ALL, rope_scaling=(32, 1, 4, 8192))
    save_config(config, tmp_path / "config.toml")
    assert load_config(tmp_path / "config.toml", ModelConfig) == config


@pytest.mark.parametrize("window", [None, 1, 3])
@torch.no_grad()
def test_attention_of_several_tokens_to_a_cache_is_that_of_all(window: int | None) -> None:
    attention = random_attention(torch.float64, sliding_window=window)
    x = torch.randn(2, 9, 16, dtype=torch.float64)
    sizes: dict[str, Any] = {"context_length": 9, "num_layers": 1, "num_heads": 4, "num_kv_heads": 2, "head_dim": 6}
    cache = KVCache(tiny(**sizes), 2, dtype=torch.float64)
    parts = []
    for part in x.split((4, 4, 1), 1):
        parts.append(attention(part, None, cache.of_layer(0)))
        cache.advance(part.shape[1])
    assert_close(torch.cat(parts, 1), attention(x))
