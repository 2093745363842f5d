"""Trees of tensors and plain values: shared memory is stored once, and shared again after loading."""

import json
from collections import OrderedDict
from typing import Any

import pytest
import torch

from basic.training.checkpoints.tensor_tree import flatten_tree, tensor_names, unflatten_tree


def round_trip(tree):
    node, tensors = flatten_tree(tree)
    return unflatten_tree(json.loads(json.dumps(node)), tensors)


def test_the_json_of_a_tree():
    """The format that the docstring of the module describes."""
    weight = torch.zeros(2, 3)
    tree = {"text": "a", "one": 1.0, "rate": (float("inf"), 2**64), "table": {1: None}, "w": [weight, weight[:, 1]]}
    node, tensors = flatten_tree(tree)
    assert json.loads(json.dumps(node)) == {
        "text": "a",
        "one": 1.0,
        "rate": {"$tuple": [{"$float": "inf"}, {"$int": "0x10000000000000000"}]},
        "table": {"$dict": [[1, None]]},
        "w": [{"$tensor": "w.0"}, {"$tensor": "w.0", "view": ["float32", [2], [3], 1]}],
    }
    assert list(tensors) == ["w.0"]


def test_views_share_memory_again():
    base = torch.arange(12.0)
    tree: dict[str, Any] = {"a": base, "b": [base, base.view(3, 4).T], "c": base[3:5], "alone": base.clone()}
    loaded = round_trip(tree)
    base += 100
    loaded["a"] += 100
    for key in ("a", "c", "alone"):
        assert torch.equal(loaded[key], tree[key])
    assert torch.equal(loaded["b"][1], tree["b"][1])
    assert loaded["b"][1].stride() == (1, 4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.complex128, torch.float8_e4m3fnuz])
def test_overlapping_views_of_which_none_covers_the_others(dtype):
    memory = torch.arange(640, dtype=torch.uint8).view(dtype).view(2, -1)
    views = [memory[:, 1:3], memory[:, 2], memory[1, 2:4]]
    node, tensors = flatten_tree(views)
    assert [tensor.dtype for tensor in tensors.values()] == [torch.uint8]
    for loaded, view in zip(unflatten_tree(node, tensors), views, strict=True):
        assert (loaded.dtype, loaded.stride()) == (dtype, view.stride())
        assert torch.equal(loaded.contiguous().view(torch.uint8), view.contiguous().view(torch.uint8))


def test_views_of_several_dtypes():
    memory = torch.arange(64, dtype=torch.uint8)
    views = [memory[4:36].view(torch.float32), memory[24:40].view(torch.int64), memory[30:33]]
    node, tensors = flatten_tree(views)
    assert sum(tensor.nbytes for tensor in tensors.values()) == 40
    for loaded, view in zip(unflatten_tree(node, tensors), views, strict=True):
        assert loaded.dtype == view.dtype
        assert torch.equal(loaded.view(torch.uint8), view.view(torch.uint8))


def test_adjacent_views_of_one_storage_are_stored_separately():
    """For example parameters that are slices of one flat buffer: each keeps its name and shape."""
    flat = torch.arange(10.0)
    _, tensors = flatten_tree({"a": flat[:4].view(2, 2), "b": flat[4:4], "c": flat[4:]})
    assert {name: list(tensor.shape) for name, tensor in tensors.items()} == {"a": [2, 2], "b": [0], "c": [6]}


def test_a_slice_is_stored_without_the_rest_of_its_storage():
    big = torch.zeros(1000, 1000)
    _, tensors = flatten_tree([big[3, :5], big[500:, 7], big[999, 999]])
    assert [tensor.numel() for tensor in tensors.values()] == [5, 500, 1]


def test_lazily_conjugated_tensors():
    z = torch.tensor([1 + 2j, 3 - 4j])
    loaded = round_trip([z, z.conj(), z.conj().imag])
    for actual, expected in zip(loaded, [z, z.conj(), z.conj().imag], strict=True):
        assert torch.equal(actual, expected)


def test_equal_paths_get_different_names():
    tree = {"a": {"b": torch.tensor(1)}, "a.b": torch.tensor(2), "c": {1: torch.tensor(3), "1": torch.tensor(4)}}
    node, tensors = flatten_tree(tree)
    assert list(tensors) == ["a.b", "a.b~", "c.1", "c.1~"]
    assert unflatten_tree(node, tensors)["c"] == {1: 3, "1": 4}


def test_names_are_valid_text():
    _, tensors = flatten_tree({"\ud800": torch.zeros(1)})
    assert list(tensors) == ["\\ud800"]


def test_contiguous_tensors_are_not_copied():
    x = torch.zeros(3)
    _, tensors = flatten_tree([x])
    assert tensors["0"].data_ptr() == x.data_ptr()


def test_an_unknown_type():
    with pytest.raises(ValueError, match=r"'\$set' is no type that this version"):
        unflatten_tree({"$set": [1]}, {})


@pytest.mark.parametrize("kind", [dict, OrderedDict])
def test_names_of_stored_tensors(kind):
    weight = torch.zeros(2, 3)
    node, tensors = flatten_tree({"model": kind(own=torch.ones(1), tied=weight, other=weight)})
    names = tensor_names(json.loads(json.dumps(node["model"])))
    assert names == {"own": "model.own", "tied": "model.tied", "other": "model.tied"}
    assert set(names.values()) == set(tensors)
