"""Training with several processes: the run of one process, checkpoints that move, and a process that is killed."""

import re
import signal
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist

from basic.model import TransformerLM
from basic.training.parallel.world import ALONE, World
from basic.training.records.metrics import read_records
from basic.training.run_folder import checkpoint_paths, load_run, open_checkpoint
from basic.training.step import pieces_of
from basic.transformer.kernels import dispatch
from tests.helpers.fault_tools import VOCAB, configuration
from tests.helpers.ranks_tools import do, lose, losses, start_processes, state
from tests.project.test_scripts import run_script


def assert_same_bits(run_dir: Path, other: Path) -> None:
    (document, tensors), (others_document, others_tensors) = state(run_dir), state(other)
    assert document == others_document
    assert tensors.keys() == others_tensors.keys()
    assert all(torch.equal(tensors[name], others_tensors[name]) for name in tensors)


def test_two_processes_do_what_one_does_and_end_when_one_is_killed(tmp_path, monkeypatch, capsys):
    names = "one replicated sharded r_s s_s s_1 half_replicated half_sharded half_one narrow narrow_one wide"
    run = {name: tmp_path / name for name in f"{names} bad_one bad_replicated bad_sharded long".split()}
    sharded = {"parallel": "sharded", "gradient_accumulation": 2}
    short = {"steps": 6, "sample_interval": 0, "checkpoint_interval": 0}
    half, narrow = {**short, "reduce_precision": "bfloat16"}, {**short, "precision": "bfloat16"}
    wide = {**narrow, "reduce_precision": "float32"}
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
            {"run": str(run["bad_replicated"]), **bad},
            {"run": str(run["bad_sharded"]), "parallel": "sharded", **bad},
            {"run": str(run["long"]), "steps": 10**6, "eval_interval": 0, "sample_interval": 0},
        ],
    )
    try:
        do({"run": run["one"]}, ALONE)
        do({"run": run["half_one"], **half}, ALONE)
        do({"run": run["narrow_one"], **narrow}, ALONE)
        do({"run": run["bad_one"], **bad}, ALONE)
        error, seconds = lose(processes, run["long"], signal.SIGKILL)
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
        assert len((run[name] / "samples.txt").read_text().splitlines()) == 3  # one process wrote
    for name, one in (("half_replicated", "half_one"), ("half_sharded", "half_one"), ("narrow", "narrow_one")):
        differences = np.abs(np.subtract(losses(run[name]), losses(run[one])))
        assert 1e-7 < differences.max() < 1e-2, name
    assert losses(run["wide"]) != losses(run["narrow"])
    np.testing.assert_allclose(losses(run["wide"]), losses(run["narrow_one"]), atol=1e-2, rtol=0)
    for name in ("bad_one", "bad_replicated", "bad_sharded"):
        skipped = [record["step"] for record in read_records(run[name] / "metrics.jsonl", "nonfinite")]
        assert skipped == [2, 4], name
        np.testing.assert_allclose(losses(run[name]), losses(run["bad_one"]), atol=1e-5, rtol=0)
    assert [path.is_dir() for path in checkpoint_paths(run["sharded"])] == [True, True]
    assert [path.is_dir() for path in checkpoint_paths(run["r_s"])] == [False, True]
    assert_same_bits(run["s_s"], run["sharded"])

    # One process goes on with what two have done, and reads it.
    do({"run": run["s_1"], "from": run["sharded"], "parallel": "sharded"}, ALONE)
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
    damaged(run["sharded"])


def damaged(run_dir: Path) -> None:
    """Of a folder, every file must be there and unchanged."""
    folder = checkpoint_paths(run_dir)[-1]
    files = sorted(folder.iterdir())
    assert len(files) == 3
    for path in files:
        whole = path.read_bytes()
        middle = len(whole) // 2
        for content in (whole[:middle], whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :], None):
            path.unlink() if content is None else path.write_bytes(content)
            with pytest.raises(ValueError, match=r"step_00000020 is not a whole checkpoint"):
                open_checkpoint(folder)
            path.write_bytes(whole)
    open_checkpoint(folder)
    files[0].write_text("{}")
    with pytest.warns(UserWarning, match="step_00000020 is not a whole"):
        assert load_run(run_dir, device="cpu").step == 10


def test_every_row_of_a_batch_is_computed_by_one_process():
    rows = [World(rank, 3).own_rows(24, 2) for rank in range(3)]
    assert [None if part is None else part.tolist() for part in rows] == [
        [0, 1, 2, 3, 12, 13, 14, 15],
        [4, 5, 6, 7, 16, 17, 18, 19],
        [8, 9, 10, 11, 20, 21, 22, 23],
    ]
    assert ALONE.own_rows(24, 2) is None
    with pytest.raises(ValueError, match=r"batch_size=16, .* by 3 processes x gradient_accumulation=2; .* is 18"):
        World(0, 3).own_rows(16, 2)


def test_a_process_has_a_device_of_its_own(monkeypatch):
    assert World(1, 2, 1).device_name("cpu") == "cpu"
    assert ALONE.device_name("cuda:3") == "cuda:3"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert World(5, 8, 1).device_name("auto") == "cuda:1"
    with pytest.raises(ValueError, match="'cuda:0' cannot be that of 2 processes"):
        World(1, 2, 1).device_name("cuda:0")
    with pytest.raises(ValueError, match="process 2 of this machine has no GPU of its own, there are 2"):
        World(2, 4, 2).device_name("cuda")


@pytest.fixture
def waited() -> list[int]:
    """Which of the groups of `sent` were waited for."""
    return []


@pytest.fixture
def sent(monkeypatch, waited) -> list[list[torch.Tensor]]:
    """The gradients that a process sends together; the other one has the same, which are there when it has waited."""
    sent = []

    class Group:
        def allreduce_coalesced(self, gradients, options):
            sent.append(gradients)
            number = len(sent)

            def wait():
                waited.append(number)
                for gradient in gradients:
                    gradient.mul_(2)

            return SimpleNamespace(wait=wait)

    monkeypatch.setattr(dist, "group", SimpleNamespace(WORLD=Group()))
    return sent


def backward_of(model: TransformerLM) -> Callable[[torch.Tensor, bool], Iterable[list[torch.Tensor]]]:
    return World(0, 2).backward(model, pieces_of(model), None)


@pytest.mark.parametrize("with_kernels", [True, False])
def test_gradients_are_sent_while_the_backward_pass_runs(sent, waited, monkeypatch, with_kernels):
    """A piece's when the next attention's gradient begins, or, where no kernel says so, when the next piece has its."""
    model = TransformerLM(configuration().model)
    names = {parameter: name for name, parameter in model.named_parameters()}
    blocks = [
        sorted(name for name in names.values() if name.startswith(f"layers.{i}.") and "ln" not in name) for i in (0, 1)
    ]
    vectors = sorted(name for name in names.values() if "ln" in name)
    groups = [["lm_head.weight"], blocks[1], blocks[0], [*vectors, "token_embeddings.weight"]]
    triton_ops = SimpleNamespace(before_attention_gradients=[])
    monkeypatch.setattr(dispatch, "triton_ops", triton_ops if with_kernels else None)
    order: list[str | int] = []
    seen = {}

    def attend(layer: int) -> None:
        before = len(sent)
        for act in triton_ops.before_attention_gradients:
            act()
        seen[layer] = before, len(sent)

    for layer, block in enumerate(model.layers):
        block.get_submodule("attn").register_full_backward_pre_hook(lambda *_, layer=layer: attend(layer))
    for parameter, name in names.items():
        parameter.register_post_accumulate_grad_hook(lambda _, name=name: order.append(name))
    backward = backward_of(model)
    for parameter in names:
        parameter.register_post_accumulate_grad_hook(lambda _: order.append(len(sent)))
    ids = torch.randint(VOCAB, (4, 33))
    arriving = backward(model.loss(ids[:, :-1], ids[:, 1:]), True)
    assert [sorted(names[p] for p in names if any(p.grad is each for each in group)) for group in sent] == groups
    complete = [max(order.index(name) for name in group) for group in groups]
    assert complete == sorted(complete)
    assert seen == ({1: (0, 1), 0: (1, 2)} if with_kernels else {1: (0, 0), 0: (1, 1)})
    for number, last in enumerate(complete[1:]):
        assert order[last + 1] == number + 1, "not sent when the next group was complete"
    assert not triton_ops.before_attention_gradients
    # Whoever goes through the gradients waits for one group at a time.
    for number, group in enumerate(arriving, 1):
        assert all(gradient is each for gradient, each in zip(group, sent[number - 1], strict=True))
        assert waited == list(range(1, number + 1))
    assert waited == [1, 2, 3, 4]


@pytest.mark.parametrize("shape", [{}, {"tied_embeddings": True}, {"norm": "none"}], ids=str)
@pytest.mark.parametrize("frozen", ["", "token_embeddings", "lm_head", "layers.1"])
def test_all_gradients_are_sent_once_for_all_parts_of_a_batch(sent, monkeypatch, shape, frozen):
    model = TransformerLM(replace(configuration().model, **shape))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not frozen or not name.startswith(frozen))
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    backward = backward_of(model)
    ids = torch.randint(VOCAB, (4, 33))
    expected = torch.autograd.grad(model.loss(ids[:, :-1], ids[:, 1:]), parameters)
    triton_ops = SimpleNamespace(before_attention_gradients=[])
    monkeypatch.setattr(dispatch, "triton_ops", triton_ops)
    failing = model.layers[0].get_parameter("ffn.w1.weight").register_hook(lambda gradient: 1 // 0)
    with pytest.raises(ZeroDivisionError):
        backward(model.loss(ids[:, :-1], ids[:, 1:]), True)
    assert not triton_ops.before_attention_gradients
    failing.remove()
    for _ in range(2):  # a backward pass that failed leaves nothing behind, nor does one that was done
        model.zero_grad(set_to_none=True)
        sent.clear()
        for _ in range(3):
            assert list(backward(model.loss(ids[:, :-1], ids[:, 1:]), False)) == sent == []
        arrived = [each for group in backward(model.loss(ids[:, :-1], ids[:, 1:]), True) for each in group]
        assert len(arrived) == len(parameters)
        for parameter, gradient in zip(parameters, expected, strict=True):
            torch.testing.assert_close(parameter.grad, 4 * gradient)  # four parts, half of each from each process
            assert sum(parameter.grad is each for each in arrived) == 1
    sent.clear()
    model.loss(ids[:, :-1], ids[:, 1:]).backward()  # of somebody else
    assert not sent


def test_gradients_are_added_up_in_another_precision(sent):
    model = TransformerLM(configuration().model)
    parameters = list(model.parameters())
    ids = torch.randint(VOCAB, (4, 33))
    own = torch.autograd.grad(model.loss(ids[:, :-1], ids[:, 1:]) / 2, parameters)
    backward = World(0, 2).backward(model, pieces_of(model), torch.bfloat16)
    arrived = [each for group in backward(model.loss(ids[:, :-1], ids[:, 1:]), True) for each in group]
    assert {gradient.dtype for group in sent for gradient in group} == {torch.bfloat16}
    assert len(arrived) == len(parameters)
    for parameter, gradient in zip(parameters, own, strict=True):
        assert any(parameter.grad is each for each in arrived)
        torch.testing.assert_close(parameter.grad, 2 * gradient.bfloat16().float(), rtol=2**-7, atol=0)


def test_what_is_frozen_afterwards_is_an_error(sent):
    """Instead of gradients that nobody adds up."""
    model = TransformerLM(configuration().model)
    backward = backward_of(model)
    matrix = model.layers[1].get_parameter("ffn.w1.weight")
    matrix.requires_grad_(False)
    ids = torch.randint(VOCAB, (4, 33))
    with pytest.raises(RuntimeError, match="6 gradients were not sent, because others that travel with them are"):
        backward(model.loss(ids[:, :-1], ids[:, 1:]), True)
    matrix.requires_grad_(True)
    model.zero_grad(set_to_none=True)
    arrived = [each for group in backward(model.loss(ids[:, :-1], ids[:, 1:]), True) for each in group]
    assert len(arrived) == len(list(model.parameters()))


@pytest.mark.parametrize("size", [1, 2])
def test_gradients_of_what_is_frozen_are_nobodys(sent, size):
    model = TransformerLM(configuration().model)
    model.lm_head.weight.requires_grad_(False)
    model.lm_head.weight.grad = torch.ones_like(model.lm_head.weight)
    ids = torch.randint(VOCAB, (4, 33))
    groups = World(0, size).backward(model, pieces_of(model), None)(model.loss(ids[:, :-1], ids[:, 1:]), True)
    arrived = [each for group in groups for each in group]
    assert len(arrived) == len(list(model.parameters())) - 1
    assert not any(each is model.lm_head.weight.grad for each in arrived)
