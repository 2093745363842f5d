"""A configuration of somebody else may ask for any size: it is compared with the weights before memory is taken."""

import dataclasses
import json
from typing import Any

import pytest
import torch

from basic.common.errors import InvalidInputError
from basic.formats.export_model import export_hf
from basic.formats.import_model import import_pt, load_model
from basic.model import ModelConfig, TransformerLM
from basic.training.settings import RunConfig, TrainConfig

SIZES: dict[str, Any] = dict(vocab_size=20, context_length=8, d_model=8, num_layers=2, num_heads=2, d_ff=8)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_hidden_layers": 10**9}, r"the weights lack 'model\.layers\.2\.input_layernorm\.weight'"),
        ({"num_hidden_layers": 1}, r"has 'model\.layers\.1\..* which is not a weight of this model"),
        ({"max_position_embeddings": 10**12}, "does not fit into memory, with positions for context_length = 10{12};"),
        ({"max_position_embeddings": 10**30}, "does not fit into memory, with positions for context_length = 10{30};"),
        ({"vocab_size": 10**15}, r"'lm_head\.weight' as torch\.float32 of shape \(20, 8\); this model"),
        ({"intermediate_size": 10**30}, "has sizes that no model can have"),
    ],
    ids=str,
)
def test_sizes_are_compared_with_the_weights_first(changes, message, tmp_path):
    export_hf(TransformerLM(ModelConfig(**SIZES)), tmp_path / "llama")
    config = tmp_path / "llama" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | changes))
    (tmp_path / "llama" / "checksums.json").unlink()
    with pytest.raises(InvalidInputError, match=message):
        load_model(tmp_path / "llama")


def test_the_sizes_of_a_pt_file_too(tmp_path):
    torch.save(TransformerLM(ModelConfig(**SIZES)).state_dict(), tmp_path / "a.pt")
    config = RunConfig(model=dataclasses.replace(ModelConfig(**SIZES), num_layers=10**9), train=TrainConfig(steps=1))
    with pytest.raises(InvalidInputError, match=r"the weights lack 'layers\.2\.ln1\.weight'"):
        import_pt(tmp_path / "a.pt", tmp_path / "run", config)
