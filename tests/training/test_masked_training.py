"""Loss only where it counts, documents packed into rows, dropout, and activation checkpointing."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from basic.common.errors import DamagedFileError, InvalidConfigError, InvalidInputError
from basic.model import TransformerLM
from basic.tokens.flat_file import TokenFileWriter
from basic.tokens.info import BEGINS_DOCUMENT, IS_LEARNED, mask_path, read_sidecar
from basic.tokens.opening import open_mask, open_tokens
from basic.training.batches import BatchSampler, check_learned
from basic.training.loop import train
from basic.training.records.metrics import read_metrics
from basic.training.settings import RunConfig, TrainConfig
from basic.training.step import mean_loss
from basic.transformer.functional import IGNORE_INDEX, dropout
from tests.helpers.model_tools import tiny
from tests.helpers.number_tokenizer import END, NumberTokenizer
from tests.training.test_loop import step_that_fails

VOCAB, CONTEXT = 11, 10


def corpus(seed: int, num_documents: int = 60) -> np.ndarray:
    random = np.random.default_rng(seed)
    documents = [[END, *random.integers(1, VOCAB, random.integers(1, 14))] for _ in range(num_documents)]
    return np.concatenate(documents).astype(np.uint16)


def mask_of(tokens: np.ndarray, share: float, seed: int) -> np.ndarray:
    learned = np.random.default_rng(seed).random(len(tokens)) < share
    return (learned * IS_LEARNED + (tokens == END) * BEGINS_DOCUMENT).astype(np.uint8)


def token_file(path: Path, tokens: np.ndarray, mask: np.ndarray | None) -> np.ndarray:
    with TokenFileWriter(path, VOCAB, with_mask=mask is not None) as writer:
        for start in range(0, len(tokens), 100):
            chunk = slice(start, start + 100)
            writer.write(tokens[chunk], mask=None if mask is None else mask[chunk])
    return open_tokens(path, verify=True)


@pytest.fixture
def data(tmp_path) -> list[np.ndarray]:
    tokens = [corpus(seed) for seed in (0, 1)]
    return [token_file(tmp_path / f"{i}.bin", ids, mask_of(ids, 0.3, i)) for i, ids in enumerate(tokens)]


def configuration(**settings) -> RunConfig:
    defaults: dict[str, Any] = dict(steps=6, batch_size=4, warmup_steps=1, log_interval=1, eval_batches=2, device="cpu")
    return RunConfig(
        model=tiny(vocab_size=VOCAB, context_length=CONTEXT), train=TrainConfig(**{**defaults, **settings})
    )


def assert_same_weights(a: TransformerLM, b: TransformerLM, *, rtol: float = 0.0, atol: float = 0.0) -> None:
    for (name, ours), theirs in zip(a.named_parameters(), b.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, msg=name, rtol=rtol, atol=atol)


# --- Token files with a mask ----------------------------------------------------------------------------------


def test_a_mask_is_read_back_and_damage_is_found(tmp_path):
    tokens = corpus(0)
    mask = mask_of(tokens, 0.3, 0)
    path = tmp_path / "a.bin"
    opened = token_file(path, tokens, mask)
    np.testing.assert_array_equal(open_mask(opened), mask)
    assert read_sidecar(path).mask_sha256 is not None
    mask_path(path).write_bytes(bytes(len(mask)))
    open_tokens(path)
    with pytest.raises(DamagedFileError, match=r"a\.mask has changed"):
        open_tokens(path, verify=True)
    mask_path(path).write_bytes(b"")
    with pytest.raises(DamagedFileError, match=r"a\.mask, the mask of .*, has 0 bytes"):
        open_mask(opened)
    mask_path(path).unlink()
    with pytest.raises(DamagedFileError, match="is missing"):
        open_mask(opened)
    # A file without a mask has none, also if that of an earlier file is beside it.
    mask_path(path).write_bytes(mask.tobytes())
    opened = token_file(path, tokens, None)
    assert open_mask(opened) is None
    assert read_sidecar(path).mask_sha256 is None
    assert "mask_sha256" not in path.with_suffix(".json").read_text()
    assert open_mask(tokens) is None


def test_a_view_of_a_token_file_has_the_same_part_of_its_mask(tmp_path):
    tokens = corpus(0)
    mask = mask_of(tokens, 0.3, 0)
    opened, length = token_file(tmp_path / "a.bin", tokens, mask), len(tokens)
    slices = [
        slice(100),
        slice(100, None),
        slice(None, None, -1),
        slice(-1, 7, -3),
        slice(5, 90, 7),
        slice(length, None),
    ]
    for part in [*slices, slice(3, 4), slice(0, 0), slice(0, 1, -1)]:
        np.testing.assert_array_equal(open_mask(opened[part]), mask[part])
        np.testing.assert_array_equal(open_mask(np.asarray(opened[part])), mask[part])
        np.testing.assert_array_equal(open_mask(opened[20:][part][2:]), mask[20:][part][2:])
    own = np.memmap(tmp_path / "a.bin", np.uint16, "r", offset=20, shape=50)
    np.testing.assert_array_equal(open_mask(own[5:]), mask[15:60])
    for view in (opened.view(np.uint8), np.lib.stride_tricks.as_strided(opened, (9,), (0,)), opened[:10].reshape(2, 5)):
        with pytest.raises(InvalidInputError, match=r"is no slice of the .* ids of .*a\.bin"):
            open_mask(view)
    assert open_mask(np.array(opened[:9])) is None
    assert open_mask(opened[[3, 4]]) is None


def test_training_on_a_part_of_a_file_learns_what_its_mask_says(data, tmp_path):
    half = len(data[0]) // 2
    copy = token_file(tmp_path / "half.bin", np.array(data[0][:half]), mask_of(data[0], 0.3, 0)[:half])
    runs = [
        train(configuration(), tokens, data[1], tmp_path / name)
        for name, tokens in (("a", copy), ("b", data[0][:half]))
    ]
    assert_same_weights(runs[0].model, runs[1].model)
    other = token_file(tmp_path / "other.bin", np.array(data[0]), mask_of(data[0], 0.5, 7))
    with pytest.raises(InvalidInputError, match="was started with other train_tokens"):
        train(configuration(steps=9), other[:half], data[1], tmp_path / "b", resume=True)


@pytest.mark.parametrize("rows", ["windows", "shuffled", "documents", "packed"])
def test_batches_have_the_targets_of_the_mask(data, rows):
    tokens, mask = data[0], open_mask(data[0])
    assert mask is not None
    starts = np.flatnonzero(tokens == END) if rows == "packed" else None
    if rows == "documents":
        starts = np.flatnonzero(tokens[:-CONTEXT] == END)
    how: dict[str, Any] = {"seed": 3, "starts": starts, "shuffled": rows == "shuffled", "packed": rows == "packed"}
    sampler = BatchSampler(tokens, 4, CONTEXT, mask=mask, vocab_size=VOCAB, **how)
    unmasked = BatchSampler(tokens, 4, CONTEXT, vocab_size=VOCAB, **how)
    for step in range(3):
        x, y, num_targets, *_ = sampler.batch(step)
        x_all, y_all, *_ = unmasked.batch(step)
        assert torch.equal(x, x_all)
        assert ((y == y_all) | (y == IGNORE_INDEX)).all()
        assert num_targets == (y != IGNORE_INDEX).sum()
    # Every learned token of an epoch is a target.
    if rows == "packed":
        batches = BatchSampler(
            tokens, sampler.packed.num_rows if sampler.packed else 0, CONTEXT, mask=mask, **how
        ).batch(0)
        learned = tokens[1:][mask[1:] & IS_LEARNED > 0]
        assert sorted(batches[1][batches[1] != IGNORE_INDEX].tolist()) == sorted(learned.tolist())


def test_ranks_and_micro_batches_divide_by_the_targets_of_the_whole_batch(data):
    mask = open_mask(data[0])
    torch.manual_seed(0)
    model = TransformerLM(tiny(vocab_size=VOCAB, context_length=CONTEXT))
    full = BatchSampler(data[0], 4, CONTEXT, seed=0, mask=mask).batch(0)
    mean = torch.nn.functional.cross_entropy(model(full[0]).flatten(0, 1), full[1].flatten())
    torch.testing.assert_close(model.loss(*full), mean)
    of_ranks = []
    for rows in ([0, 2], [1, 3]):
        sampler = BatchSampler(data[0], 4, CONTEXT, seed=0, mask=mask, local_sequences=np.array(rows))
        of_ranks.append(model.loss(*sampler.batch(0)))
    torch.testing.assert_close(sum(of_ranks) / 2, mean)  # gradients are averaged over the ranks
    losses = [model.loss(full[0][[i]], full[1][[i]], full[2]) for i in range(4)]
    torch.testing.assert_close(sum(losses), mean)


def test_a_batch_without_targets_changes_nothing():
    tokens = corpus(0)
    sampler = BatchSampler(tokens, 2, CONTEXT, seed=0, mask=np.zeros(len(tokens), np.uint8))
    model = TransformerLM(tiny(vocab_size=VOCAB, context_length=CONTEXT))
    loss = model.loss(*sampler.batch(0))
    loss.backward()
    assert loss == 0
    assert not any(parameter.grad is None or parameter.grad.any() for parameter in model.parameters())


@pytest.mark.parametrize("accumulation", [1, 2, 4])
def test_training_with_a_mask_equals_a_loop_with_torchs_ignore_index(data, tmp_path, accumulation):
    config = configuration(rows="shuffled", gradient_accumulation=accumulation, weight_decay=0.0, seed=2)
    run = train(config, *data, tmp_path / "run")
    torch.manual_seed(2)
    model = TransformerLM(config.model)
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), weight_decay=0.0)
    sampler = BatchSampler(data[0], 4, CONTEXT, seed=2, shuffled=True, mask=open_mask(data[0]))
    for step, record in enumerate(read_metrics(tmp_path / "run" / "metrics.jsonl"), 1):
        x, y, *_ = sampler.batch(step - 1)
        loss = torch.nn.functional.cross_entropy(model(x).flatten(0, 1), y.flatten(), ignore_index=-100)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.param_groups[0]["lr"] = record["learning_rate"]
        optimizer.step()
        assert record["train_loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert_same_weights(run.model, model, rtol=1e-4, atol=1e-5)
    # The validation loss is the mean over the targets of all batches.
    valid = BatchSampler(data[1], 4, CONTEXT, seed=3, shuffled=True, mask=open_mask(data[1]))
    batches = [valid.batch(step) for step in range(2)]
    x, y = torch.cat([b[0] for b in batches]), torch.cat([b[1] for b in batches])
    expected = torch.nn.functional.cross_entropy(run.model(x).flatten(0, 1), y.flatten()).item()
    assert batches[0][2] != batches[1][2]
    assert mean_loss(run.model.loss, valid, 2, torch.device("cpu")) == pytest.approx(expected, rel=1e-5)
    assert read_metrics(tmp_path / "run" / "metrics.jsonl")[-1]["valid_loss"] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("rows", ["windows", "packed"])
def test_tokens_of_which_none_is_learned_are_refused(data, tmp_path, monkeypatch, rows):
    mask = np.full(len(data[0]), BEGINS_DOCUMENT, np.uint8)
    mask[0] |= IS_LEARNED  # the first token is the target of nothing
    nothing = token_file(tmp_path / "nothing.bin", np.array(data[0]), mask)
    for name, tokens in (("training", (nothing, data[1])), ("validation", (data[0], nothing))):
        with pytest.raises(InvalidInputError, match=f"^{name} tokens: the mask of these .* none that is learned"):
            train(configuration(rows=rows), *tokens, tmp_path / "run")
    monkeypatch.setattr("basic.tokens.packed_documents._CHUNK_TOKENS", 2)
    check_learned(np.array([0, 0, 0, IS_LEARNED], np.uint8))


# --- Packed documents -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [{}, {"num_kv_heads": 1, "value_embeddings": True}, {"positions": "none"}, {"sliding_window": 3}],
    ids=str,
)
def test_a_packed_document_gives_what_it_gives_alone(changes):
    torch.manual_seed(1)
    model = TransformerLM(tiny(vocab_size=VOCAB, context_length=CONTEXT, **changes)).double()
    tokens = corpus(4)
    starts = np.flatnonzero(tokens == END)
    sampler = BatchSampler(tokens, 6, CONTEXT, seed=0, starts=starts, packed=True)
    x, y, num_targets, begins = sampler.batch(0)
    features = model.features(x, document_starts=begins)
    total, num_documents = 0.0, 0
    for row, ids, targets, row_begins in zip(features, x, y, begins, strict=True):
        for first in row_begins.unique():
            inside = row_begins == first
            alone = model.features(ids[inside][None])[0]
            torch.testing.assert_close(row[inside], alone)
            if (targets[inside] != IGNORE_INDEX).any():
                logits = model.lm_head(alone)
                total += torch.nn.functional.cross_entropy(logits, targets[inside], reduction="sum")
                num_documents += 1
    assert num_documents > 6
    torch.testing.assert_close(model.loss(x, y, num_targets.double(), begins), total / num_targets)


def test_a_run_is_not_resumed_with_another_mask(data, tmp_path):
    config = configuration(steps=2, warmup_steps=0)
    train(config, *data, tmp_path / "run")
    other = token_file(tmp_path / "other.bin", np.asarray(data[0]), mask_of(data[0], 0.5, 7))
    with pytest.raises(InvalidInputError, match="was started with other train_tokens"):
        train(configuration(steps=3), other, data[1], tmp_path / "run", resume=True)


def test_packed_rows_resume_with_another_batch_size_and_train_like_any(tmp_path):
    tokens = [corpus(seed) for seed in (0, 1)]
    tokenizer = NumberTokenizer(VOCAB)
    config = configuration(rows="packed", batch_size=6, checkpoint_interval=3, steps=6)
    expected = train(config, *tokens, tmp_path / "a", tokenizer=tokenizer)
    with pytest.raises(KeyboardInterrupt):
        train(config, *tokens, tmp_path / "b", tokenizer=tokenizer, make_step=step_that_fails(3, KeyboardInterrupt()))
    resumed = train(config, *tokens, tmp_path / "b", tokenizer=tokenizer, resume=True)
    assert_same_weights(resumed.model, expected.model)
    starts = np.flatnonzero(tokens[0] == END)
    six = BatchSampler(tokens[0], 6, CONTEXT, seed=0, starts=starts, packed=True)
    four = BatchSampler(tokens[0], 4, CONTEXT, seed=0, starts=starts, packed=True)
    rows = torch.cat([six.batch(step)[0] for step in range(2)])
    assert torch.equal(rows, torch.cat([four.batch(step)[0] for step in range(3)]))
    four.sequence_offset = 6 - 4  # what a run resumed after one step of six sets
    assert torch.equal(four.batch(1)[0], rows[6:10])
    with pytest.raises(InvalidConfigError, match='rows = "packed" needs a tokenizer with the special token'):
        train(config, *tokens, tmp_path / "c")


# --- Dropout and checkpointing --------------------------------------------------------------------------------


def test_dropout_keeps_the_mean_and_zeroes_its_share():
    torch.manual_seed(0)
    x = torch.full((200_000,), 3.0)
    y = dropout(x, 0.2)
    assert set(y.unique().tolist()) == {0.0, 3.0 / 0.8}
    assert (y == 0).float().mean().item() == pytest.approx(0.2, abs=0.005)
    assert y.mean().item() == pytest.approx(3.0, abs=0.03)


def test_a_run_with_dropout_resumes_exactly_and_evaluates_without_it(tmp_path):
    tokens = [corpus(seed) for seed in (0, 1)]
    config = configuration(dropout=0.3, checkpoint_interval=3, eval_interval=2)
    expected = train(config, *tokens, tmp_path / "a")
    with pytest.raises(KeyboardInterrupt):
        train(config, *tokens, tmp_path / "b", make_step=step_that_fails(4, KeyboardInterrupt()))
    resumed = train(config, *tokens, tmp_path / "b", resume=True)
    assert_same_weights(resumed.model, expected.model)
    without = train(configuration(), *tokens, tmp_path / "c")
    assert not torch.equal(without.model.lm_head.weight, expected.model.lm_head.weight)
    last = read_metrics(tmp_path / "a" / "metrics.jsonl")[-1]
    valid = BatchSampler(tokens[1], 4, CONTEXT, seed=1)
    assert last["valid_loss"] == pytest.approx(mean_loss(expected.model.loss, valid, 2, torch.device("cpu")), rel=1e-6)
    with pytest.raises(InvalidConfigError, match="dropout must be at least 0 and below 1, got 1"):
        TrainConfig(steps=1, dropout=1.0)


@pytest.mark.parametrize("rate", [0.0, 0.4])
@pytest.mark.parametrize("norm", ["pre", "post"])
def test_checkpointing_gives_the_same_gradients_with_less_kept(rate, norm):
    torch.manual_seed(0)
    model = TransformerLM(tiny(vocab_size=VOCAB, context_length=CONTEXT, norm=norm))
    x = torch.randint(VOCAB, (3, CONTEXT), generator=torch.Generator().manual_seed(1))
    gradients, kept = {}, {}
    for recomputes in (False, True):
        model.configure_training(rate, recomputes)
        sizes: list[int] = []
        torch.manual_seed(5)
        with torch.autograd.graph.saved_tensors_hooks(lambda t, sizes=sizes: sizes.append(t.numel()) or t, lambda t: t):
            loss = model.loss(x, x)
        kept[recomputes] = sum(sizes)
        gradients[recomputes] = torch.autograd.grad(loss, list(model.parameters()))
    for a, b in zip(gradients[False], gradients[True], strict=True):
        assert torch.equal(a, b)
    assert kept[True] < kept[False] / 2
    # It changes neither evaluation nor generation.
    model.eval()
    with torch.no_grad():
        assert torch.equal(model(x), model(x))


def test_a_run_with_checkpointing_has_the_same_weights(tmp_path):
    tokens = [corpus(seed) for seed in (0, 1)]
    runs = [
        train(configuration(activation_checkpointing=on, dropout=0.1, steps=3), *tokens, tmp_path / str(on))
        for on in (False, True)
    ]
    assert_same_weights(runs[0].model, runs[1].model)
    assert replace(runs[0].config.train, activation_checkpointing=True) == runs[1].config.train
