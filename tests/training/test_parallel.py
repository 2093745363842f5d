"""Training with several processes equals training with one; checkpoints fit both; a killed process ends the job."""

import os
import re
import signal
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from basic.common.errors import DamagedFileError, InvalidConfigError
from basic.model import TransformerLM
from basic.training.checkpoints.of_run import checkpoint_paths, open_checkpoint
from basic.training.parallel.replica import GradientReducer
from basic.training.parallel.world import SINGLE_PROCESS, World
from basic.training.records.metrics import read_records
from basic.training.run_folder import load_run
from basic.training.step import model_segments
from basic.transformer.kernels import dispatch
from tests.helpers.fault_tools import VOCAB, configuration
from tests.helpers.ranks_tools import losses, newest_state, run_job, signal_rank_1, start_processes
from tests.helpers.scripts import run_script


def assert_equal_checkpoints(run_dir: Path, other_dir: Path) -> None:
    (document, tensors), (other_document, other_tensors) = newest_state(run_dir), newest_state(other_dir)
    assert document == other_document
    assert tensors.keys() == other_tensors.keys()
    assert all(torch.equal(tensors[name], other_tensors[name]) for name in tensors)


@pytest.mark.long
@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGKILL")
def test_two_processes_train_as_one_does_and_end_when_one_is_killed(tmp_path, monkeypatch, capsys):
    names = (
        "one replicated sharded r_s s_s s_1 half_replicated half_sharded half_one narrow narrow_one wide "
        "muon muon_sharded muon_s_s muon_one"
    )
    run = {name: tmp_path / name for name in f"{names} bad_one bad_replicated bad_sharded long".split()}
    sharded = {"parallel": "sharded", "gradient_accumulation": 2}
    short = {"steps": 6, "sample_interval": 0, "checkpoint_interval": 0}
    half, narrow = {**short, "reduce_precision": "bfloat16"}, {**short, "precision": "bfloat16"}
    wide = {**narrow, "reduce_precision": "float32"}
    muon = {"sample_interval": 0, "optimizer": "muon", "rows": "shuffled", "max_learning_rate": 0.02}
    bad = {**short, "poisoned": [2, 4], "on_nonfinite": "skip", "max_nonfinite_steps": 2}
    processes = start_processes(
        2,
        [
            {"run": str(run["replicated"]), "gradient_accumulation": 4, "other_weights": True},
            {"run": str(run["sharded"]), **sharded},
            {"run": str(run["s_s"]), "from": str(run["sharded"]), **sharded},
            {"run": str(run["r_s"]), "from": str(run["replicated"]), **sharded},
            {"run": str(run["half_replicated"]), **half},
            {"run": str(run["half_sharded"]), "parallel": "sharded", **half},
            {"run": str(run["narrow"]), **narrow},
            {"run": str(run["wide"]), **wide},
            {"run": str(run["muon"]), **muon},
            {"run": str(run["muon_sharded"]), "parallel": "sharded", **muon},
            {"run": str(run["muon_s_s"]), "from": str(run["muon_sharded"]), "parallel": "sharded", **muon},
            {"run": str(run["bad_replicated"]), **bad},
            {"run": str(run["bad_sharded"]), "parallel": "sharded", **bad},
            {"run": str(run["long"]), "steps": 10**6, "eval_interval": 0, "sample_interval": 0},
        ],
    )
    try:
        run_job({"run": run["one"]}, SINGLE_PROCESS)
        run_job({"run": run["half_one"], **half}, SINGLE_PROCESS)
        run_job({"run": run["narrow_one"], **narrow}, SINGLE_PROCESS)
        run_job({"run": run["muon_one"], **muon}, SINGLE_PROCESS)
        run_job({"run": run["bad_one"], **bad}, SINGLE_PROCESS)
        error, seconds = signal_rank_1(processes, run["long"], signal.SIGKILL)
    finally:
        for process in processes:
            process.kill()
    assert processes[0].returncode == 1
    assert re.search(rf"rank 0 .*rank 1 \(process {processes[1].pid} on .*\) is gone", error), error
    assert seconds < 60

    for name in ("replicated", "sharded", "s_s", "r_s"):
        np.testing.assert_allclose(losses(run[name]), losses(run["one"]), atol=1e-5, rtol=0)
        samples = [read_records(folder / "metrics.jsonl", "sample")[-1]["text"] for folder in (run[name], run["one"])]
        assert samples[0] == samples[1]
        assert len((run[name] / "samples.txt").read_text().splitlines()) == 3  # written by one process
    for name, one in (("half_replicated", "half_one"), ("half_sharded", "half_one"), ("narrow", "narrow_one")):
        differences = np.abs(np.subtract(losses(run[name]), losses(run[one])))
        assert 1e-7 < differences.max() < 1e-2, name
    assert losses(run["wide"]) != losses(run["narrow"])
    np.testing.assert_allclose(losses(run["wide"]), losses(run["narrow_one"]), atol=1e-2, rtol=0)
    for name in ("muon", "muon_sharded", "muon_s_s"):
        np.testing.assert_allclose(losses(run[name]), losses(run["muon_one"]), atol=1e-4, rtol=0)
    assert_equal_checkpoints(run["muon_s_s"], run["muon_sharded"])
    for name in ("bad_one", "bad_replicated", "bad_sharded"):
        skipped = [record["step"] for record in read_records(run[name] / "metrics.jsonl", "nonfinite")]
        assert skipped == [2, 4], name
        np.testing.assert_allclose(losses(run[name]), losses(run["bad_one"]), atol=1e-5, rtol=0)
    assert [path.is_dir() for path in checkpoint_paths(run["sharded"])] == [True, True]
    assert [path.is_dir() for path in checkpoint_paths(run["r_s"])] == [False, True]
    assert_equal_checkpoints(run["s_s"], run["sharded"])

    # One process resumes and loads what two have saved.
    run_job({"run": run["s_1"], "from": run["sharded"], "parallel": "sharded"}, SINGLE_PROCESS)
    np.testing.assert_allclose(losses(run["s_1"]), losses(run["one"]), atol=1e-5, rtol=0)
    assert not checkpoint_paths(run["s_1"])[-1].is_dir()
    assert load_run(run["sharded"], device="cpu").step == 20
    run_script(monkeypatch, "consolidate", run["sharded"])
    name = "step_00000020.safetensors"
    assert f"wrote {run['sharded'] / 'checkpoints' / name} (" in capsys.readouterr().out
    file, folder = (open_checkpoint(run["sharded"] / "checkpoints" / n) for n in (name, "step_00000020"))
    assert file.document == folder.document
    assert {n: t.tolist() for n, t in file.tensors.items()} == {n: t.tolist() for n, t in folder.tensors.items()}
    (run["sharded"] / "checkpoints" / name).unlink()
    assert_damage_is_found(run["sharded"])


def assert_damage_is_found(run_dir: Path) -> None:
    """A checkpoint folder with a missing, shortened or changed file is not loaded."""
    folder = checkpoint_paths(run_dir)[-1]
    files = sorted(folder.iterdir())
    assert len(files) == 3
    for path in files:
        original = path.read_bytes()
        middle = len(original) // 2
        changed = original[:middle] + bytes([original[middle] ^ 1]) + original[middle + 1 :]
        for content in (original[:middle], changed, None):
            path.unlink() if content is None else path.write_bytes(content)
            with pytest.raises(DamagedFileError, match=r"step_00000020 is not a complete checkpoint"):
                open_checkpoint(folder)
            path.write_bytes(original)
    open_checkpoint(folder)
    files[0].write_text("{}")
    with pytest.warns(UserWarning, match="step_00000020 is not a complete"):
        assert load_run(run_dir, device="cpu").step == 10


def test_every_sequence_of_a_batch_is_computed_by_one_rank():
    sequences = [World(rank, 3).local_sequences(24, 2) for rank in range(3)]
    assert [None if indices is None else indices.tolist() for indices in sequences] == [
        [0, 1, 2, 3, 12, 13, 14, 15],
        [4, 5, 6, 7, 16, 17, 18, 19],
        [8, 9, 10, 11, 20, 21, 22, 23],
    ]
    assert SINGLE_PROCESS.local_sequences(24, 2) is None
    message = r"batch_size=16, .* by 3 processes x gradient_accumulation=2; .* is 18"
    with pytest.raises(InvalidConfigError, match=message):
        World(0, 3).local_sequences(16, 2)


def test_each_rank_has_its_own_device(monkeypatch):
    assert World(1, 2, 1).device_name("cpu") == "cpu"
    assert SINGLE_PROCESS.device_name("cuda:3") == "cuda:3"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert World(5, 8, 1).device_name("auto") == "cuda:1"
    with pytest.raises(InvalidConfigError, match="'cuda:0' cannot be that of 2 processes"):
        World(1, 2, 1).device_name("cuda:0")
    with pytest.raises(InvalidConfigError, match="process 2 of this machine has no GPU of its own, there are 2"):
        World(2, 4, 2).device_name("cuda")


class OtherRank:
    """Stands in for the all-reduce with one other rank, whose gradients are equal: waiting for it doubles them."""

    def __init__(self):
        self.buckets: list[list[torch.Tensor]] = []
        self.waited_for: list[int] = []

    def all_reduce(self, tensors):
        self.buckets.append(tensors)
        number = len(self.buckets)

        def wait():
            self.waited_for.append(number)
            for tensor in tensors:
                tensor.mul_(2)

        return SimpleNamespace(wait=wait)


@pytest.fixture
def other() -> OtherRank:
    return OtherRank()


def make_backward(model: TransformerLM, other: OtherRank, dtype: torch.dtype | None = None):
    return GradientReducer(model_segments(model), dtype, 2, all_reduce=other.all_reduce).backward


def random_ids() -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.randint(VOCAB, (4, 33))
    return ids[:, :-1], ids[:, 1:]


def flatten(buckets) -> list[torch.Tensor]:
    return [gradient for bucket in buckets for gradient in bucket]


@pytest.mark.parametrize("with_kernels", [True, False])
def test_buckets_are_reduced_while_the_backward_pass_runs(other, with_kernels):
    """A bucket is reduced when the next attention's gradient begins; without kernels, when the next one is complete."""
    model = TransformerLM(configuration().model)
    names = {parameter: name for name, parameter in model.named_parameters()}
    blocks = [
        sorted(name for name in names.values() if name.startswith(f"layers.{i}.") and "ln" not in name) for i in (0, 1)
    ]
    vectors = sorted(name for name in names.values() if "ln" in name)
    expected = [["lm_head.weight"], blocks[1], blocks[0], [*vectors, "token_embeddings.weight"]]
    operators = SimpleNamespace(before_attention_gradients=[])
    order: list[str | int] = []  # names of gradients that are ready, and the number of buckets reduced by then
    reduced_at_attention = {}

    def begin_attention_gradient(layer: int) -> None:
        before = len(other.buckets)
        for callback in operators.before_attention_gradients:
            callback()
        reduced_at_attention[layer] = before, len(other.buckets)

    for layer, block in enumerate(model.layers):
        attention = block.get_submodule("attn")
        attention.register_full_backward_pre_hook(lambda *_, layer=layer: begin_attention_gradient(layer))
    for parameter, name in names.items():
        parameter.register_post_accumulate_grad_hook(lambda _, name=name: order.append(name))
    backward = make_backward(model, other)
    for parameter in names:
        parameter.register_post_accumulate_grad_hook(lambda _: order.append(len(other.buckets)))
    with dispatch.use_operators(operators if with_kernels else None):
        results = backward(model.loss(*random_ids()), True)
    assert [
        sorted(names[p] for p in names if any(p.grad is gradient for gradient in bucket)) for bucket in other.buckets
    ] == expected
    complete_at = [max(order.index(name) for name in bucket) for bucket in expected]
    assert complete_at == sorted(complete_at)
    assert reduced_at_attention == ({1: (0, 1), 0: (1, 2)} if with_kernels else {1: (0, 0), 0: (1, 1)})
    for number, index in enumerate(complete_at[1:]):
        assert order[index + 1] == number + 1, "not reduced when the next bucket was complete"
    assert not operators.before_attention_gradients
    # Iterating over the gradients waits for one bucket at a time.
    for number, bucket in enumerate(results, 1):
        assert all(gradient is sent for gradient, sent in zip(bucket, other.buckets[number - 1], strict=True))
        assert other.waited_for == list(range(1, number + 1))
    assert other.waited_for == [1, 2, 3, 4]


@pytest.mark.parametrize("shape", [{}, {"tied_embeddings": True}, {"norm": "none"}], ids=str)
@pytest.mark.parametrize("frozen", ["", "token_embeddings", "lm_head", "layers.1"])
def test_gradients_are_reduced_once_for_all_micro_batches(other, shape, frozen):
    model = TransformerLM(replace(configuration().model, **shape))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not frozen or not name.startswith(frozen))
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    backward = make_backward(model, other)
    batch = random_ids()
    expected = torch.autograd.grad(model.loss(*batch), parameters)
    operators = SimpleNamespace(before_attention_gradients=[])
    failing = model.layers[0].get_parameter("ffn.w1.weight").register_hook(lambda gradient: 1 // 0)
    with dispatch.use_operators(operators), pytest.raises(ZeroDivisionError):
        backward(model.loss(*batch), True)
    assert not operators.before_attention_gradients
    failing.remove()
    for _ in range(2):  # neither a failed nor a finished backward pass affects the next one
        model.zero_grad(set_to_none=True)
        other.buckets.clear()
        for _ in range(3):
            assert list(backward(model.loss(*batch), False)) == other.buckets == []
        gradients = flatten(backward(model.loss(*batch), True))
        assert len(gradients) == len(parameters)
        for parameter, gradient in zip(parameters, expected, strict=True):
            torch.testing.assert_close(parameter.grad, 4 * gradient)  # 4 micro-batches; each rank adds half of each
            assert sum(parameter.grad is each for each in gradients) == 1
    other.buckets.clear()
    model.loss(*batch).backward()  # by other code
    assert not other.buckets


def test_gradients_are_reduced_in_another_precision(other):
    model = TransformerLM(configuration().model)
    parameters = list(model.parameters())
    batch = random_ids()
    expected = torch.autograd.grad(model.loss(*batch) / 2, parameters)
    gradients = flatten(make_backward(model, other, torch.bfloat16)(model.loss(*batch), True))
    assert {gradient.dtype for gradient in flatten(other.buckets)} == {torch.bfloat16}
    assert len(gradients) == len(parameters)
    for parameter, gradient in zip(parameters, expected, strict=True):
        assert any(parameter.grad is each for each in gradients)
        torch.testing.assert_close(parameter.grad, 2 * gradient.bfloat16().float(), rtol=2**-7, atol=0)


def test_a_parameter_that_is_frozen_during_training_is_an_error(other):
    """Otherwise the other gradients of its bucket would not be reduced."""
    model = TransformerLM(configuration().model)
    backward = make_backward(model, other)
    matrix = model.layers[1].get_parameter("ffn.w1.weight")
    matrix.requires_grad_(False)
    batch = random_ids()
    with pytest.raises(RuntimeError, match="6 gradients were not reduced, because other gradients of their bucket are"):
        backward(model.loss(*batch), True)
    matrix.requires_grad_(True)
    model.zero_grad(set_to_none=True)
    gradients = flatten(backward(model.loss(*batch), True))
    assert len(gradients) == len(list(model.parameters()))


@pytest.mark.parametrize("size", [1, 2])
def test_gradients_of_frozen_parameters_are_left_out(other, size):
    model = TransformerLM(configuration().model)
    model.lm_head.weight.requires_grad_(False)
    model.lm_head.weight.grad = torch.ones_like(model.lm_head.weight)
    alone = SINGLE_PROCESS.make_backward(model, model_segments(model), None)
    backward = alone if size == 1 else make_backward(model, other)
    gradients = flatten(backward(model.loss(*random_ids()), True))
    assert len(gradients) == len(list(model.parameters())) - 1
    assert not any(gradient is model.lm_head.weight.grad for gradient in gradients)
