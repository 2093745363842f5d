"""The block and the language model against torch.nn.functional and transformers' Llama; sizes and initial weights."""

from __future__ import annotations

import json
import math
import re
from typing import Any

import jaxtyping
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.testing import assert_close
from torch.utils.flop_counter import FlopCounterMode

from basic.common.errors import InvalidConfigError, InvalidInputError
from basic.model import KVCache, Linear, ModelConfig, MultiHeadSelfAttention, RotaryPositionalEmbedding, TransformerLM
from basic.training.settings import MuonConfig, RunConfig, TrainConfig
from tests._snapshots.make_model_snapshots import SHAPE, SNAPSHOT, llama, llama_name, llama_rows, random_weights
from tests.adapters import run_transformer_block, run_transformer_lm
from tests.helpers.model_tools import TOLERANCE, every_dtype, float64, rotated, self_attention, tiny


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


# --- the block and the language model -------------------------------------------------------------------------


def reference_block(x: Tensor, weights: dict[str, Tensor], config: ModelConfig) -> Tensor:
    """One block of torch's functions, with all ablations."""

    def norm(x: Tensor, name: str) -> Tensor:
        return F.rms_norm(x, x.shape[-1:], weights[f"{name}.weight"], config.norm_eps)

    def attention(x: Tensor) -> Tensor:
        projections = [weights[f"attn.{name}_proj.weight"] for name in ("q", "k", "v", "output")]
        if config.positions == "none":
            return self_attention(x, projections, config.num_heads)
        rotate = lambda q: rotated(q, torch.arange(q.shape[-2]), config.rope_theta)  # noqa: E731
        return self_attention(x, projections, config.num_heads, rotate)

    def feed_forward(x: Tensor) -> Tensor:
        hidden = F.silu(x @ weights["ffn.w1.weight"].T)
        if config.ffn == "swiglu":
            hidden = hidden * (x @ weights["ffn.w3.weight"].T)
        return hidden @ weights["ffn.w2.weight"].T

    if config.norm == "post":
        z = norm(x + attention(x), "ln1")
        return norm(z + feed_forward(z), "ln2")
    if config.norm == "none":
        z = x + attention(x)
        return z + feed_forward(z)
    z = x + attention(norm(x, "ln1"))
    return z + feed_forward(norm(z, "ln2"))


def reference_logits(ids: Tensor, weights: dict[str, Tensor], config: ModelConfig) -> Tensor:
    x = F.embedding(ids, weights["token_embeddings.weight"])
    for layer in range(config.num_layers):
        start = f"layers.{layer}."
        block = {name.removeprefix(start): w for name, w in weights.items() if name.startswith(start)}
        x = reference_block(x, block, config)
    if config.norm != "none":
        x = F.rms_norm(x, x.shape[-1:], weights["ln_final.weight"], config.norm_eps)
    return F.linear(x, weights["lm_head.weight"])


@every_dtype
def test_block_is_torchs(dtype: torch.dtype) -> None:
    weights = {
        name.removeprefix("layers.1."): w.to(dtype)
        for name, w in random_weights(SHAPE, seed=2).items()
        if name.startswith("layers.1.")
    }
    sizes = {name: SHAPE[name] for name in ("d_model", "num_heads", "d_ff")}
    [(x, x64)] = float64(dtype, (2, 7, 24))
    actual = run_transformer_block(**sizes, max_seq_len=9, theta=100.0, weights=weights, in_features=x)
    config = tiny(**sizes, rope_theta=100.0)
    expected = reference_block(x64, {name: w.double() for name, w in weights.items()}, config)
    # Six roundings to bfloat16 one after the other, of numbers up to 5.
    assert_close(actual.double(), expected, rtol=2 * TOLERANCE[dtype], atol=2 * TOLERANCE[dtype])
    assert actual.dtype == dtype


@pytest.mark.parametrize(
    ("sizes", "seq"),
    [({}, 12), ({}, 1), ({"num_heads": 1, "num_layers": 1, "d_ff": 7}, 5), ({"num_heads": 12, "rope_theta": 1e6}, 12)],
    ids=str,
)
def test_language_model_is_transformers_llama(sizes: dict[str, Any], seq: int) -> None:
    shape = SHAPE | sizes
    weights, ids = random_weights(shape, seed=3), torch.randint(13, (2, seq))
    expected = llama(shape, weights)(ids).logits
    assert_close(run_transformer_lm(**shape, weights=weights, in_indices=ids), expected, rtol=0, atol=1e-4)


def test_language_model_learns_as_transformers_llama_does() -> None:
    weights, ids = random_weights(SHAPE, seed=4), torch.randint(13, (2, 12))
    theirs, ours = llama(SHAPE, weights), TransformerLM(ModelConfig(**SHAPE))
    ours.load_state_dict(weights)
    for logits in (ours(ids), theirs(ids).logits):
        F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
    expected = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    for name, parameter in ours.named_parameters():
        assert parameter.grad is not None
        actual = llama_rows(name, parameter.grad, SHAPE)
        assert_close(actual, expected[llama_name(name)], rtol=1e-4, atol=1e-5, msg=lambda text, n=name: f"{n}: {text}")


@every_dtype
def test_language_model_gives_the_logits_of_llama_on_disk(dtype: torch.dtype) -> None:
    snapshot = json.loads(SNAPSHOT.read_text(encoding="utf-8"))
    weights = {name: w.to(dtype) for name, w in random_weights(snapshot["shape"], snapshot["seed"]).items()}
    actual = run_transformer_lm(**snapshot["shape"], weights=weights, in_indices=torch.tensor(snapshot["token_ids"]))
    tolerance = 0.15 if dtype == torch.bfloat16 else 1e-5  # in bfloat16 the weights are rounded too
    assert actual.dtype == dtype
    assert_close(actual.float(), torch.tensor(snapshot["logits"]), rtol=0, atol=tolerance)


@pytest.mark.parametrize("norm", ["pre", "post", "none"])
@pytest.mark.parametrize("positions", ["rope", "none"])
@pytest.mark.parametrize("ffn", ["swiglu", "silu"])
@pytest.mark.parametrize("tied", [False, True])
def test_ablations_are_torchs(norm: Any, positions: Any, ffn: Any, tied: bool) -> None:
    config = tiny(norm=norm, positions=positions, ffn=ffn, tied_embeddings=tied)
    model = TransformerLM(config).double()
    state = model.state_dict()

    in_block = ["attn.q_proj", "attn.k_proj", "attn.v_proj", "attn.output_proj", "ffn.w1", "ffn.w2"]
    in_block += ["ffn.w3"] * (ffn == "swiglu") + ["ln1", "ln2"] * (norm != "none")
    names = [f"layers.{layer}.{name}" for layer in range(2) for name in in_block]
    names += ["token_embeddings", "lm_head"] + ["ln_final"] * (norm != "none")
    assert set(state) == {f"{name}.weight" for name in names}
    assert (state["lm_head.weight"].data_ptr() == state["token_embeddings.weight"].data_ptr()) == tied

    for name, parameter in model.named_parameters():
        if "ln" in name:
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    ids = torch.randint(11, (3, 7))
    assert_close(model(ids), reference_logits(ids, state, config), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("norm", ["pre", "post"])
@pytest.mark.parametrize("positions", ["rope", "none"])
def test_later_tokens_do_not_change_earlier_outputs(norm: Any, positions: Any) -> None:
    model = TransformerLM(tiny(norm=norm, positions=positions)).double()
    ids = torch.randint(11, (2, 10))
    others = ids.clone()
    others[:, 6:] = (ids[:, 6:] + torch.randint(1, 11, (2, 4))) % 11
    difference = (model(ids) - model(others)).abs().amax(-1)
    assert difference[:, :6].max() < 1e-12
    assert difference[:, 6:].min() > 1e-3


@pytest.mark.parametrize("norm", ["pre", "post"])
@pytest.mark.parametrize("positions", ["rope", "none"])
@pytest.mark.parametrize("lengths", [(10,), (4, 1, 1, 3, 1), (1,) * 10], ids=str)
@torch.no_grad()
def test_cache_changes_nothing(norm: Any, positions: Any, lengths: tuple[int, ...]) -> None:
    config = tiny(norm=norm, positions=positions)
    model, cache = TransformerLM(config).double(), KVCache(config, batch_size=2, dtype=torch.float64)
    ids, logits = torch.randint(11, (2, 10)), []
    for chunk in ids.split(lengths, dim=1):
        logits.append(model(chunk, cache))
        cache.advance(chunk.shape[1])
    assert_close(torch.cat(logits, dim=1), model(ids), rtol=1e-10, atol=1e-10)


def test_a_cache_that_was_not_advanced_is_overwritten() -> None:
    config = tiny()
    model, cache = TransformerLM(config), KVCache(config, batch_size=1)
    with torch.no_grad():
        model(torch.tensor([[1, 2, 3]]), cache)
        assert_close(model(torch.tensor([[4, 5]]), cache), model(torch.tensor([[4, 5]])))


def test_more_tokens_than_the_context_is_an_error() -> None:
    config = tiny()
    model, cache = TransformerLM(config), KVCache(config, batch_size=1)
    with pytest.raises(InvalidInputError, match="11 tokens do not fit into context_length=10"):
        model(torch.zeros(1, 11, dtype=torch.int64))
    cache.advance(8)
    with pytest.raises(InvalidInputError, match="11 tokens do not fit into context_length=10"):
        model(torch.zeros(1, 3, dtype=torch.int64), cache)


@pytest.mark.parametrize("bad_id", [-1, 13])
def test_the_language_model_names_a_bad_id(bad_id: int) -> None:
    ids = torch.tensor([[0, 12], [bad_id, 3]])
    with pytest.raises(IndexError, match=rf"token id {bad_id} at position \(1, 0\) is outside 0 \.\. 12"):
        run_transformer_lm(**SHAPE, weights=random_weights(SHAPE, seed=0), in_indices=ids)


def test_the_language_model_names_a_wrong_argument(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # type checks would fail first
    model, ids = TransformerLM(tiny()), torch.zeros(1, 2, dtype=torch.int64)
    with pytest.raises(TypeError, match="token_ids must be a tensor of integers, got list"):
        model([1, 2])
    with pytest.raises(TypeError, match=r"cache must be a KVCache, got Tensor; .* model\.loss\(token_ids, targets\)"):
        model(ids, ids)
    with pytest.raises(TypeError, match=r"targets must have the dtype int64 or int32, got torch\.float32"):
        model.loss(ids, ids.float())


@pytest.mark.parametrize(("batch_size", "length"), [(2, 0), (0, 3)])
def test_no_tokens_give_no_logits(batch_size: int, length: int) -> None:
    config = ModelConfig(vocab_size=20, context_length=8, d_model=16, num_layers=1, num_heads=2, num_kv_heads=1)
    ids = torch.zeros(batch_size, length, dtype=torch.int64)
    assert TransformerLM(config)(ids).shape == (batch_size, length, 20)
    assert TransformerLM(config)(ids, KVCache(config, batch_size)).shape == (batch_size, length, 20)


def test_the_loss_of_the_language_model_ignores_minus_100() -> None:
    model = TransformerLM(tiny())
    ids, targets = torch.randint(10, (2, 6)), torch.randint(10, (2, 6))
    targets[:, 2:] = -100
    assert_close(model.loss(ids, targets), model.loss(ids[:, :2], targets[:, :2]))


@pytest.mark.parametrize("change", ["missing", "surplus", "shape"])
def test_weights_that_do_not_fit_are_refused(change: str) -> None:
    weights = random_weights(SHAPE, seed=0)
    name = "layers.1.ffn.w3.weight"
    if change == "missing":
        del weights[name]
    elif change == "surplus":
        name = "layers.2.ffn.w3.weight"
        weights[name] = torch.zeros(1)
    else:
        weights[name] = weights[name].T.contiguous()
    with pytest.raises(RuntimeError, match=name.replace(".", r"\.")):
        run_transformer_lm(**SHAPE, weights=weights, in_indices=torch.tensor([[0]]))


# --- sizes, counts and initial weights ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("d_model", "ffn", "d_ff"),
    [(512, "swiglu", 1344), (768, "swiglu", 2048), (1600, "swiglu", 4288), (8, "swiglu", 64), (512, "silu", 2048)],
)
def test_default_feed_forward_size(d_model: int, ffn: Any, d_ff: int) -> None:
    config = tiny(d_model=d_model, num_layers=1, ffn=ffn, d_ff=None)
    assert config.d_ff == d_ff
    with torch.device("meta"):
        model = TransformerLM(config)
    assert model.get_parameter("layers.0.ffn.w2.weight").shape == (d_model, d_ff)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_heads": 3}, r"d_model=16 .* num_heads=3"),
        ({"d_model": 6, "num_heads": 2}, "must be even, got 3"),
        ({"vocab_size": 0}, "vocab_size must be at least 1, got 0"),
        ({"num_layers": -1}, "num_layers must be at least 1, got -1"),
        ({"num_heads": 0}, "num_heads must be at least 1, got 0"),
        ({"num_heads": 8, "num_kv_heads": 3}, "num_kv_heads=3 must be at least 1 and divide num_heads=8"),
        ({"num_kv_heads": 0}, "num_kv_heads=0 must be at least 1 and divide num_heads=2"),
        ({"num_kv_heads": -1}, "num_kv_heads=-1 must be at least 1 and divide num_heads=2"),
        ({"context_length": 0}, "context_length must be at least 1, got 0"),
        ({"d_ff": 0}, "d_ff must be at least 1, got 0"),
        ({"rope_theta": 0.0}, "rope_theta must be a number > 0, got 0"),
        ({"rope_theta": math.nan}, "rope_theta must be a finite number, got nan"),
        ({"norm_eps": -1e-5}, "norm_eps must be a number >= 0, got -1e-05"),
    ],
    ids=str,
)
def test_impossible_shapes_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidConfigError, match=message):
        tiny(**changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"norm": "before"}, "norm must be one of pre, post, sublayer, none, got 'before'"),
        ({"positions": "alibi"}, "positions must be one of rope, none, got 'alibi'"),
        ({"ffn": "gelu"}, "ffn must be one of swiglu, silu, relu2, got 'gelu'"),
    ],
)
def test_unknown_choices_are_refused(changes: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # type checks would fail first
    with pytest.raises(InvalidConfigError, match=message):
        tiny(**changes)


@pytest.mark.parametrize("size", ["300", 300.0, True])
@pytest.mark.parametrize("name", ["vocab_size", "d_model", "num_kv_heads", "d_ff"])
def test_a_size_that_is_no_integer_is_named(name: str, size: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # type checks would fail first
    with pytest.raises(TypeError, match=f"{name} must be an integer, got {type(size).__name__}: {size!r}"):
        tiny(**{name: size})


def test_odd_heads_are_possible_without_rope() -> None:
    config = tiny(d_model=6, positions="none")
    assert TransformerLM(config)(torch.tensor([[1, 2]])).shape == (1, 2, 11)


CONFIGS = [
    tiny(),
    tiny(tied_embeddings=True),
    tiny(num_kv_heads=1),
    tiny(ffn="silu", norm="none", positions="none"),
    tiny(vocab_size=50, context_length=16, d_model=24, num_layers=3, num_heads=4, d_ff=None, norm="post"),
]


@pytest.mark.parametrize("config", CONFIGS)
def test_parameters_are_counted(config: ModelConfig) -> None:
    model = TransformerLM(config)
    tensors = {tensor.data_ptr(): tensor.numel() for tensor in model.state_dict().values()}
    assert model.num_parameters == sum(tensors.values())


def test_gpt2_xl_has_the_parameters_of_the_assignment() -> None:
    config = tiny(vocab_size=50_257, context_length=1024, d_model=1600, num_layers=48, num_heads=25, d_ff=None)
    with torch.device("meta"):
        model = TransformerLM(config)
    assert model.num_parameters == 2 * 50_257 * 1600 + 48 * (4 * 1600**2 + 3 * 1600 * 4288 + 2 * 1600) + 1600


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("seq", [None, 5])
def test_flops_are_those_that_torch_counts(config: ModelConfig, seq: int | None) -> None:
    model, length = TransformerLM(config), seq or config.context_length
    with FlopCounterMode(display=False) as counter:
        model(torch.randint(config.vocab_size, (2, length)))
    assert counter.get_total_flops() == 2 * length * model.matmul_flops_per_token(seq)


@pytest.mark.parametrize("config", CONFIGS)
def test_the_summary_accounts_for_every_parameter_and_operation(config: ModelConfig) -> None:
    model = TransformerLM(config)
    table = model.summary(5)
    assert sum(row.parameters for row in table.rows) == model.num_parameters
    assert sum(row.flops_per_token for row in table.rows) == model.matmul_flops_per_token(5)
    by_name = {row.name: row for row in table.rows}
    row = by_name["layers.*.attn.k_proj.weight"]
    rows, columns = config.kv_heads * config.d_head, config.d_model
    assert row == (
        row.name,
        (rows, columns),
        config.num_layers,
        *[config.num_layers * rows * columns * f for f in (1, 2)],
    )
    assert by_name["attention to 5 tokens"].flops_per_token == config.num_layers * 4 * 5 * config.d_model
    lines = repr(table).splitlines()
    assert len(lines) == len(table.rows) + 2
    assert lines[-1].split() == ["all", f"{model.num_parameters:,}", f"{model.matmul_flops_per_token(5):,}"]
    assert any(re.search(rf"k_proj.weight +{rows} x {columns} +{config.num_layers} ", line) for line in lines)


def test_the_repr_of_a_model_and_of_a_configuration_has_what_is_not_the_default() -> None:
    config = tiny(num_kv_heads=1)
    sizes = "vocab_size=11, context_length=10, d_model=16, num_layers=2, num_heads=2, num_kv_heads=1, d_ff=24"
    assert repr(config) == f"ModelConfig({sizes})"
    assert eval(repr(tiny(norm="post", tied_embeddings=True))) == tiny(norm="post", tied_embeddings=True)
    run = RunConfig(model=config, train=TrainConfig(steps=3, muon=MuonConfig(iterations=4)))
    assert repr(run) == f"RunConfig(model={config}, train=TrainConfig(steps=3, muon=MuonConfig(iterations=4)))"
    model = TransformerLM(config).bfloat16()
    assert repr(model) == f"TransformerLM({config}: {model.num_parameters:,} parameters, bfloat16 on cpu)"


def is_truncated_normal(weight: Tensor, std: float) -> bool:
    """Whether at least 100,000 numbers are from a normal distribution truncated at 3 standard deviations."""
    sigmas = weight.detach().numpy() / std
    truncated_std = 0.98658  # of a standard normal distribution truncated to -3 .. 3
    tails = (abs(sigmas) > 2).mean()
    return bool(
        abs(sigmas.mean()) < 0.02
        and abs(sigmas.std() / truncated_std - 1) < 0.01
        and 2.9 < abs(sigmas).max() <= 3.0001
        and abs(tails - 0.0429) < 0.004  # a uniform distribution of this standard deviation has no tails
    )


@pytest.mark.parametrize("shape", [(500, 250), (200, 600)])
def test_initial_linear_weights(shape: tuple[int, int]) -> None:
    d_in, d_out = shape
    assert is_truncated_normal(Linear(d_in, d_out).weight, (2 / (d_in + d_out)) ** 0.5)


@pytest.mark.parametrize(("tied", "std"), [(False, 1.0), (True, 1 / 16)])
def test_initial_weights_of_the_language_model(tied: bool, std: float) -> None:
    model = TransformerLM(tiny(vocab_size=500, d_model=256, num_layers=1, d_ff=500, tied_embeddings=tied))
    assert is_truncated_normal(model.token_embeddings.weight, std)
    assert is_truncated_normal(model.get_parameter("layers.0.ffn.w2.weight"), (2 / 756) ** 0.5)
    assert is_truncated_normal(model.lm_head.weight, 1 / 16 if tied else (2 / 756) ** 0.5)
    norms = [parameter for name, parameter in model.named_parameters() if "ln" in name]
    assert len(norms) == 3
    assert all((norm == 1).all() for norm in norms)


def test_attention_has_no_state_but_its_weights() -> None:
    attention = MultiHeadSelfAttention(8, 2, RotaryPositionalEmbedding(1e4, 4, 6))
    assert set(attention.state_dict()) == {f"{name}_proj.weight" for name in ("q", "k", "v", "output")}
