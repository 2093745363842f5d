"""Every kernel at full size on a GPU."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="needs Triton")
if not torch.cuda.is_available():
    pytest.skip("needs a GPU", allow_module_level=True)

from basic.model import ModelConfig, TransformerLM
from basic.transformer.kernels.attention import flash_attention
from basic.transformer.optimizer import AdamW
from tests.helpers import kernel_checks

FLOAT16, BFLOAT16 = torch.float16, torch.bfloat16
HALVES = pytest.mark.parametrize("dtype", [BFLOAT16, FLOAT16])


@HALVES
@pytest.mark.parametrize("head_size", [2, 20, *range(16, 129, 16), 192, 256])
def test_attention(head_size, dtype):
    for seq in (1, 17, 64, 129, 512, 1000):
        kernel_checks.check_attention(seq, head_size, dtype, "cuda", batch=3, heads=5)


@HALVES
@pytest.mark.parametrize(
    ("seq", "head_size", "window"), [(2048, 64, 0), (2050, 64, 1000), (2048, 128, 0), (2050, 128, 1000)]
)
def test_attention_in_long_rows(seq, head_size, window, dtype):
    """More tiles than multiprocessors, so that programs for Hopper GPUs take several."""
    kernel_checks.check_attention(seq, head_size, dtype, "cuda", batch=3, heads=10, group=5, window=window)


def test_hopper_gpus_have_their_own_kernels():
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("needs a Hopper GPU")
    x = torch.zeros(1, 10, 2, 132, device="cuda", dtype=BFLOAT16)
    rows = {size: x[..., :size].contiguous() for size in (64, 96, 128)}
    hopper = partial(flash_attention._hopper, window=0, starts=None)
    assert hopper(x[..., :128]) is None  # the copy engine cannot read these
    assert hopper(rows[96]) is None
    assert hopper(rows[128], starts=x) is None
    assert hopper(rows[64], window=2) is None
    if flash_attention.triton.__version__.startswith("3.6."):
        assert hopper(rows[64]) is not None
        assert hopper(rows[128]) is not None
        assert hopper(rows[128], window=2) is not None


@HALVES
@pytest.mark.parametrize(
    ("head_size", "window", "group"), [(64, 0, 1), (32, 0, 1), (24, 0, 1), (64, 100, 4), (128, 0, 2)]
)
def test_attention_in_packed_documents(head_size, window, group, dtype):
    for seq, documents in ((64, 1), (129, 30), (1000, 3), (1024, 200)):
        options = {"batch": 3, "heads": 2 * group, "group": group, "window": window, "documents": documents}
        kernel_checks.check_attention(seq, head_size, dtype, "cuda", **options)


@HALVES
@pytest.mark.parametrize(("head_size", "heads", "group"), [(64, 9, 3), (64, 8, 4), (128, 6, 6), (40, 4, 2)])
def test_attention_with_shared_keys(head_size, heads, group, dtype):
    for seq in (1, 17, 129, 1000):
        kernel_checks.check_attention(seq, head_size, dtype, "cuda", batch=3, heads=heads, group=group)


@HALVES
@pytest.mark.parametrize(("head_size", "heads", "group"), [(64, 8, 4), (128, 4, 1), (40, 4, 2)])
@pytest.mark.parametrize("window", [2, 64, 100, 700])
def test_attention_in_a_window(head_size, heads, group, window, dtype):
    for seq in (17, 129, 1000):
        kernel_checks.check_attention(seq, head_size, dtype, "cuda", heads=heads, group=group, window=window)


@HALVES
@pytest.mark.parametrize("head_size", [16, 128])
def test_attention_finds_nan(head_size, dtype):
    kernel_checks.check_attention_finds_nan(head_size, dtype, "cuda")


@HALVES
@pytest.mark.parametrize(("seq", "head_size"), [(256, 32), (1023, 80)])
def test_rotation(seq, head_size, dtype):
    kernel_checks.check_rotation(seq, head_size, dtype, "cuda")


@HALVES
@pytest.mark.parametrize("shape", [(4, 777, 2 * 1344), (501, 2 * 77)])
def test_swiglu(shape, dtype):
    kernel_checks.check_swiglu(shape, dtype, "cuda")


# In float16 the gradients of a mean over 1001 rows underflow with a large vocabulary.
@pytest.mark.parametrize(
    ("vocab_size", "dtype"), [(257, FLOAT16), *((size, BFLOAT16) for size in (257, 10_000, 32_768, 50_257))]
)
@pytest.mark.parametrize("chunk_rows", [1001, 300])
def test_cross_entropy(vocab_size, chunk_rows, dtype):
    kernel_checks.check_cross_entropy(1001, vocab_size, chunk_rows, dtype, "cuda")


@pytest.mark.parametrize(("vocab_size", "ignore_index"), [(257, -100), (257, 5), (50_257, -100)])
@pytest.mark.parametrize("chunk_rows", [1001, 300])
def test_ignored_targets(vocab_size, ignore_index, chunk_rows):
    kernel_checks.check_ignored_targets(1001, vocab_size, chunk_rows, ignore_index, BFLOAT16, "cuda")


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("bad_id", [-100, -1, 50, 2**40])
def test_an_id_outside_the_vocabulary_makes_the_loss_nan(compiled, bad_id):
    """The process goes on: PyTorch's own indexing would stop it, or count from the end."""
    config = ModelConfig(vocab_size=50, context_length=16, d_model=32, num_layers=1, num_heads=2)
    model = TransformerLM(config).cuda()
    loss = torch.compile(model.loss) if compiled else model.loss
    ids = torch.randint(50, (2, 17), device="cuda")
    for dtype in (None, BFLOAT16):
        model.activation_dtype = dtype
        for position in (0, 16):  # an input, and a target alone
            wrong = ids.clone()
            wrong[1, position] = bad_id
            value = loss(wrong[:, :-1], wrong[:, 1:])
            assert value.isfinite() if bad_id == -100 and position == 16 else value.isnan()
        assert loss(ids[:, :-1], ids[:, 1:]).isfinite()


@pytest.mark.parametrize("dtype", [torch.float32, BFLOAT16])
def test_adamw(dtype):
    kernel_checks.check_adamw([1_000_003, *range(1, 100), 2048 * 4096], dtype, "cuda")


def test_the_optimizer_against_pytorchs_over_twenty_steps():
    torch.manual_seed(0)
    ours = [torch.nn.Parameter(torch.randn(1000, 37, device="cuda")) for _ in range(3)]
    theirs = [torch.nn.Parameter(parameter.detach().clone()) for parameter in ours]
    settings: dict[str, Any] = {"lr": 1e-2, "betas": (0.9, 0.95), "weight_decay": 0.1}
    optimizer, peer = AdamW(ours, **settings), torch.optim.AdamW(theirs, **settings)
    for _ in range(20):
        for a, b in zip(ours, theirs, strict=True):
            a.grad = torch.randn_like(a)
            b.grad = a.grad.clone()
        optimizer.step()
        peer.step()
    assert max((a - b).abs().max().item() for a, b in zip(ours, theirs, strict=True)) < 1e-5


def test_registrations():
    kernel_checks.check_registrations(BFLOAT16, "cuda")


@HALVES
@pytest.mark.parametrize("prompt_lengths", [[1], [30], [3, 1, 60], [5] * 17, [5] * 64, [5] * 65], ids=len)
@pytest.mark.parametrize(
    ("d_model", "num_heads", "num_kv_heads", "tied"),
    [
        (768, 12, 12, False),
        (96, 3, 3, False),
        (1024, 8, 8, False),
        (576, 9, 3, True),
        (160, 4, 1, False),
        (512, 2, 1, True),
    ],
)
def test_decoder(d_model, num_heads, num_kv_heads, tied, prompt_lengths, dtype):
    sizes: dict[str, Any] = {
        "vocab_size": 1001,
        "context_length": 200,
        "d_model": d_model,
        "num_heads": num_heads,
        "num_kv_heads": num_kv_heads,
        "tied_embeddings": tied,
        "num_layers": 2,
    }
    kernel_checks.check_decoder(ModelConfig(**sizes), prompt_lengths, 130, dtype, "cuda")


@HALVES
@pytest.mark.parametrize("prompt_lengths", [[1], [3, 1, 60]], ids=len)
@pytest.mark.parametrize("window", [None, 1, 50, 65])
def test_decoder_with_biases_norms_and_a_window(window, prompt_lengths, dtype):
    sizes: dict[str, Any] = {"vocab_size": 1001, "context_length": 200, "d_model": 256, "num_layers": 2, "num_heads": 6}
    sizes |= {"num_kv_heads": 2, "head_dim": 64, "qkv_bias": True, "qk_norm": True, "sliding_window": window}
    kernel_checks.check_decoder(ModelConfig(**sizes), prompt_lengths, 130, dtype, "cuda")


@HALVES
@pytest.mark.parametrize("prompt_lengths", [[1], [3, 1, 60]], ids=len)
@pytest.mark.parametrize("pattern", ["", "SL"])
def test_decoder_of_the_modern_model(pattern, prompt_lengths, dtype):
    sizes: dict[str, Any] = {"vocab_size": 1001, "context_length": 200, "d_model": 256, "num_layers": 2, "num_heads": 4}
    sizes |= {"ffn": "relu2", "embedding_norm": True, "value_embeddings": True}
    config = ModelConfig(**sizes, window_pattern=pattern, sliding_window=50 if pattern else None)
    kernel_checks.check_decoder(config, prompt_lengths, 130, dtype, "cuda")


@HALVES
@pytest.mark.parametrize("context", [12, 300])
def test_a_restarted_decoder_has_the_new_weights(context, dtype):
    config = ModelConfig(vocab_size=1001, context_length=context, d_model=128, num_layers=2, num_heads=4)
    kernel_checks.check_restarted_decoder(config, dtype, "cuda")


@HALVES
def test_decoder_finds_nan(dtype):
    kernel_checks.check_decoder_finds_nan(dtype, "cuda")
