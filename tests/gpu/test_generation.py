"""Generation with the decoding kernels beside generation without a cache."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="needs Triton")
if not torch.cuda.is_available():
    pytest.skip("needs a GPU", allow_module_level=True)

from basic.generation import gpu_decoder
from basic.generation.continuation import first_seen, generate
from basic.model import ModelConfig, TransformerLM
from basic.transformer.kernels import dispatch

CONTEXT, NEW = 200, 256
PROMPTS = [list(range(7)), [3], list(range(40, 80))]


@pytest.fixture(params=[torch.bfloat16, torch.float16, torch.float32])
def model(request) -> TransformerLM:
    torch.manual_seed(1)
    sizes: dict[str, Any] = dict(vocab_size=501, context_length=CONTEXT, d_model=256, num_layers=3, num_heads=8)
    model = TransformerLM(ModelConfig(**sizes)).cuda().eval()
    torch.nn.init.normal_(model.lm_head.weight, std=0.3)  # scores apart, as a trained model has them
    model.activation_dtype = request.param
    return model


@pytest.mark.parametrize("prompts", [PROMPTS, PROMPTS[:1]], ids=len)
def test_greedy_ids_are_those_without_a_cache_but_for_ties(model, prompts, monkeypatch):
    steps = []
    real = gpu_decoder.GpuDecoder.step
    monkeypatch.setattr(gpu_decoder.GpuDecoder, "step", lambda self: steps.append(1) or real(self))
    ids = generate(model, prompts, NEW, temperature=0.0)
    if model.activation_dtype == torch.float32:
        assert not steps
        assert ids == generate(model, prompts, NEW, temperature=0.0, use_cache=False)
        return
    assert len(steps) >= CONTEXT - max(map(len, prompts)) - 1
    without = generate(model, prompts, NEW, temperature=0.0, use_cache=False)
    agreeing = [
        next((i for i, (a, b) in enumerate(zip(*pair, strict=True)) if a != b), NEW)
        for pair in zip(ids, without, strict=True)
    ]
    print("ids until the first difference", agreeing)
    # If two scores differ by rounding only, either may win, and all later ids differ. So compare the score of each id
    # with the largest score of a full forward pass over the ids before it.
    ulp = 2.0**-8 if model.activation_dtype == torch.bfloat16 else 2.0**-11
    for prompt, new in zip(prompts, ids, strict=True):
        assert len(new) == NEW
        assert len(set(new)) > 5
        ids = torch.tensor([prompt + new], device="cuda")
        for position in range(len(prompt), ids.shape[1]):
            with torch.no_grad():
                scores = model(ids[:, first_seen(position, CONTEXT) : position])[0, -1].float()
            assert scores.max() - scores[ids[0, position]] <= 8 * ulp * scores.abs().max()


def test_draws_with_and_without_the_kernels(model):
    """The same seed, and scores that differ by rounding: almost all sequences draw the same first ids."""
    prompts = [[i % 50, 1, 2] for i in range(48)]
    settings: dict[str, Any] = {"temperature": 0.7, "top_k": 20, "seed": 5}
    with_kernels = generate(model, prompts, 3, **settings)
    without = generate(model, prompts, 3, use_cache=False, **settings)
    assert sum(a == b for a, b in zip(with_kernels, without, strict=True)) >= 40


@pytest.mark.parametrize("length", [3, 60])
def test_a_second_call_takes_the_decoder_of_the_first_with_the_new_weights(model, length):
    prompt = list(range(length))
    for _ in range(3):  # on a GPU a long prompt's first, recorded and replayed pass
        with torch.no_grad():
            model.lm_head.weight.copy_(model.lm_head.weight.roll(7, 0))
        ids = generate(model, [prompt], 3, temperature=0.0)
        kept = gpu_decoder.idle_decoders.pop(model, None)
        assert (kept is not None) == (model.activation_dtype != torch.float32)
        assert ids == generate(model, [prompt], 3, temperature=0.0)  # with a new decoder
        if kept is not None:
            gpu_decoder.idle_decoders[model] = kept


def test_sequences_end_at_their_end_id(model):
    free = generate(model, PROMPTS, 60, temperature=0.0)
    end = free[0][5]
    expected = [ids[: ids.index(end)] if end in ids else ids for ids in free]
    assert generate(model, PROMPTS, 60, temperature=0.0, end_id=end) == expected


def test_heads_that_share_keys_give_the_same_ids_with_and_without_a_cache():
    """The plain operations, in float32 without ties."""
    torch.manual_seed(1)
    config = ModelConfig(vocab_size=501, context_length=CONTEXT, d_model=256, num_layers=3, num_heads=8, num_kv_heads=2)
    model = TransformerLM(config).cuda().eval()
    torch.nn.init.normal_(model.lm_head.weight, std=0.3)
    ids = generate(model, PROMPTS, NEW, temperature=0.0)
    assert ids == generate(model, PROMPTS, NEW, temperature=0.0, use_cache=False)


def test_decoding_in_full_precision_warns_of_its_cost():
    model = TransformerLM(ModelConfig(vocab_size=50, context_length=8, d_model=32, num_layers=1, num_heads=2)).cuda()
    dispatch._warn_once.cache_clear()
    with pytest.warns(UserWarning, match="bfloat16 and float16, got float32; set model.activation_dtype"):
        generate(model, [[1]], 2)
