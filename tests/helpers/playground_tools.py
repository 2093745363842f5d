"""A playground with a tiny run, and runs with two checkpoints that can talk."""

from pathlib import Path

import numpy as np
import torch

from basic.analysis.playground.answers import Playground
from basic.model import ModelConfig, TransformerLM
from basic.Tokenizer import Tokenizer
from basic.tokenizer_files.content import ChatTemplate
from basic.training.loop import train
from basic.training.run_folder import Run
from basic.training.settings import RunConfig, TrainConfig
from tests.helpers.tokenizer_tools import BYTES

END = "<|endoftext|>"
MERGES = [(b"t", b"h"), (b"th", b"e"), (b" ", b"the")]
CONTEXT = 12
SETTINGS = {"prompt": "the", "max_new_tokens": 6, "temperature": 1.0, "top_p": 0.9, "seed": 3}


def make_playground(
    folder: Path, special_tokens: tuple[str, ...] = (END,), playground_class: type[Playground] = Playground
) -> Playground:
    """A folder with a run, whose untrained model has large logits, and a tokenizer folder beside the run."""
    tokens = [bytes([i]) for i in range(256)] + [left + right for left, right in MERGES]
    Tokenizer(dict(enumerate(tokens)), MERGES, special_tokens, kernels=False).save(folder / "tiny" / "tokenizer")
    Tokenizer(dict(enumerate(tokens[:256])), [], kernels=False).save(folder / "bytes")
    (folder / "notes.txt").write_text("nothing")
    torch.manual_seed(0)
    # The model's vocabulary is larger than the tokenizer's; the extra ids must never appear.
    shape = ModelConfig(vocab_size=300, context_length=CONTEXT, d_model=16, num_layers=1, num_heads=2)
    model = TransformerLM(shape).eval()
    with torch.no_grad():
        model.lm_head.weight.mul_(6)
    run = Run(model, RunConfig(model=shape, train=TrainConfig(steps=1)), folder / "tiny" / "tokenizer", 7)
    return playground_class(folder, {"tiny": run}, data=folder)


def the_run(playground: Playground) -> Run:
    return playground.model().run


def train_two_checkpoints(folder: Path) -> Path:
    """A folder with a trained run of a tokenizer that has a chat template."""
    source = "{% for m in messages %}{{ m.role }}:{{ m.content }}<|endoftext|>{% endfor %}"
    source += "{% if add_generation_prompt %}assistant:{% endif %}"
    tokenizer = Tokenizer(BYTES, [], [END], kernels=False, chat_template=ChatTemplate(source=source, tokens={}))
    model = ModelConfig(vocab_size=257, context_length=40, d_model=16, num_layers=2, num_heads=2)
    settings = TrainConfig(steps=4, batch_size=2, eval_interval=4, eval_batches=1, checkpoint_interval=2, device="cpu")
    ids = np.arange(600) % 257
    train(RunConfig(model=model, train=settings), ids, ids, folder / "talks", tokenizer=tokenizer)
    return folder
