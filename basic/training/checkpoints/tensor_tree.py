"""Convert a tree of tensors and plain values to JSON and named tensors, and back.

This is how state dicts are saved without pickle. Python types survive, and tensors that share memory share it again.
What JSON has (null, true, numbers, strings, lists, objects) is written as it is; 1 is an int and 1.0 is a float.
Everything else is an object whose first key begins with a dollar sign:

    {"$tuple": [items]}                     a tuple
    {"$dict": [[key, value], ...]}          a dict with keys that are not strings, or that begin with "$"
    {"$ordered_dict": [[key, value], ...]}  an OrderedDict
    {"$int": "0x..."}                       an integer beyond 64 bits
    {"$float": "inf" | "-inf" | "nan"}      a float that JSON lacks
    {"$str": "hexadecimal"}                 a string with lone surrogates, as UTF-8 bytes that include them
    {"$tensor": "name"}                     the tensor of that name, with these optional keys:
        "view": [dtype, shape, strides, offset]
                                            a view of the named tensor (strides and offset count elements of dtype)
        "requires_grad": true, "parameter": true
                                            attributes of the Python object

A tensor is named after its path in the tree, such as `model.layers.0.ln1.weight`. Tensors that share memory are stored
once. If one of them covers all others, they are views of it; if none does, all are views of a uint8 tensor. Tensors
of a dtype that safetensors does not support are views of a uint8 tensor too.
"""

from __future__ import annotations

import functools
import math
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

# Dtypes that every version of safetensors in use supports; the others are stored as bytes.
_SAFETENSORS_DTYPES = {
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2),
    *(torch.int64, torch.int32, torch.int16, torch.int8, torch.bool),
    *(torch.uint64, torch.uint32, torch.uint16, torch.uint8),
}
_OTHER_DTYPES = {
    *(torch.complex128, torch.complex64, torch.complex32),
    *(torch.float8_e4m3fnuz, torch.float8_e5m2fnuz, torch.float8_e8m0fnu, torch.float4_e2m1fn_x2),
}


def dtype_name(dtype: torch.dtype) -> str:
    """The name of a dtype without `torch.`, such as `float32`."""
    return str(dtype).removeprefix("torch.")


_DTYPES = {dtype_name(dtype): dtype for dtype in _SAFETENSORS_DTYPES | _OTHER_DTYPES}


def flatten_tree(tree: Any, to_host: Callable[[Tensor], Tensor] = Tensor.cpu) -> tuple[Any, dict[str, Tensor]]:
    """Split a tree into a JSON value and the tensors to store.

    Args:
        tree: nested dicts, lists and tuples of tensors and plain values.
        to_host: maps a contiguous tensor on any device to the CPU tensor that is returned for it.

    Returns:
        A value for `json.dumps`, and contiguous CPU tensors by name, no two of which share memory. A tensor that is
        contiguous and on the CPU is not copied.

    Raises:
        TypeError: a value is neither a dense tensor in memory nor exactly None, bool, int, float, str, list, tuple,
            dict or OrderedDict; the message has its path in the tree.
    """
    leaves: list[_Leaf] = []
    node = _to_json(tree, "", leaves)
    return node, _store(leaves, to_host)


def unflatten_tree(node: Any, tensors: Mapping[str, Tensor]) -> Any:
    """Rebuild a tree, or a subtree, from its JSON value; tensors are copied, so that they own their memory.

    Raises:
        LookupError, TypeError, ValueError: the node was not made by `flatten_tree`.
    """
    return _from_json(node, functools.cache(lambda name: tensors[name].clone()))


def tensor_names(node: Any) -> dict[str, str]:
    """The names under which the tensors of a dict are stored, by the dict's keys; all values must be tensors."""
    items = node["$ordered_dict"] if "$ordered_dict" in node else node.items()
    return {key: tensor["$tensor"] for key, tensor in items}


# --- Tensors -----------------------------------------------------------------------------------------------------


@dataclass
class _Leaf:
    """A tensor of the tree, and its JSON object, to which `_store` adds the name and the view."""

    path: str
    tensor: Tensor
    node: dict[str, Any]

    @property
    def view(self) -> tuple[str, tuple[int, ...], tuple[int, ...], int]:
        """Its dtype, shape, strides and offset in its storage; strides and offset count elements."""
        tensor = self.tensor
        return dtype_name(tensor.dtype), tuple(tensor.shape), tensor.stride(), int(tensor.storage_offset())

    @property
    def span(self) -> tuple[int, int]:
        """The range of bytes in its storage, from its first element to the end of its last."""
        _, shape, strides, offset = self.view
        extent = 0
        if self.tensor.numel() > 0:
            extent = 1 + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
        return offset * self.tensor.itemsize, (offset + extent) * self.tensor.itemsize


def _store(leaves: list[_Leaf], to_host: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
    """The contiguous CPU tensors to write, by name; fills in the JSON object of every leaf."""
    tensors: dict[str, Tensor] = {}
    for group in _overlapping_groups(leaves):
        if len({leaf.view for leaf in group}) == 1:
            contiguous = group[0].tensor.contiguous()
            for leaf in group:
                leaf.tensor = contiguous
        begin = min(leaf.span[0] for leaf in group)
        end = max(leaf.span[1] for leaf in group)
        base = _covering_leaf(group, begin, end)
        name = (base or group[0]).path.encode("utf-8", "backslashreplace").decode()
        while name in tensors:  # {1: ...} and {"1": ...} have the same path
            name += "~"
        if base is not None:
            tensors[name] = to_host(base.tensor)
        else:
            begin -= begin % 16  # so that the offset of every view is a multiple of its element size
            tensors[name] = _copy_bytes(group[0].tensor, begin, end)
        for leaf in group:
            leaf.node["$tensor"] = name
            if base is None or leaf.view != base.view:
                dtype, shape, strides, _ = leaf.view
                leaf.node["view"] = [dtype, shape, strides, (leaf.span[0] - begin) // leaf.tensor.itemsize]
    return tensors


def _overlapping_groups(leaves: list[_Leaf]) -> Iterator[list[_Leaf]]:
    """Groups of tensors whose byte ranges overlap.

    Tensors of one storage that do not overlap, such as the weights of an LSTM on a GPU, are in separate groups, because
    each can be stored by itself.
    """
    by_storage: dict[tuple[torch.device, int], list[_Leaf]] = {}
    for leaf in leaves:
        key = leaf.tensor.device, leaf.tensor.untyped_storage().data_ptr()
        by_storage.setdefault(key, []).append(leaf)
    for same_storage in by_storage.values():
        same_storage.sort(key=lambda leaf: leaf.span[0])
        group, group_end = [same_storage[0]], same_storage[0].span[1]
        for leaf in same_storage[1:]:
            if leaf.span[0] >= group_end:
                yield group
                group = []
            group.append(leaf)
            group_end = max(group_end, leaf.span[1])
        yield group


def _covering_leaf(group: list[_Leaf], begin: int, end: int) -> _Leaf | None:
    """A contiguous tensor of which all others are views, if there is one and safetensors supports its dtype."""
    if len({leaf.tensor.dtype for leaf in group}) > 1 or group[0].tensor.dtype not in _SAFETENSORS_DTYPES:
        return None
    return next((leaf for leaf in group if leaf.span == (begin, end) and leaf.tensor.is_contiguous()), None)


def _copy_bytes(tensor: Tensor, begin: int, end: int) -> Tensor:
    """A copy of a range of bytes of a tensor's storage, on the CPU."""
    memory = torch.empty(0, dtype=torch.uint8, device=tensor.device)
    return memory.set_(tensor.untyped_storage(), begin, (end - begin,), (1,)).cpu().clone()


# --- Tree to JSON ------------------------------------------------------------------------------------------------


def _to_json(value: Any, path: str, leaves: list[_Leaf]) -> Any:
    """The JSON value of a tree; its tensors are appended to `leaves`.

    Types are compared exactly: a subclass such as np.float64 or IntEnum would be loaded as another type.
    """
    kind = type(value)
    if value is None or kind is bool:
        return value
    if kind is int:
        return value if -(2**63) <= value < 2**63 else {"$int": hex(value)}
    if kind is float:
        return value if math.isfinite(value) else {"$float": repr(value)}
    if kind is str:
        return value if _is_unicode(value) else {"$str": value.encode("utf-8", "surrogatepass").hex()}
    if kind is list or kind is tuple:
        items = [_to_json(item, _join(path, index), leaves) for index, item in enumerate(value)]
        return items if kind is list else {"$tuple": items}
    if kind is dict or kind is OrderedDict:
        pairs = [[_key_to_json(key, path), _to_json(item, _join(path, key), leaves)] for key, item in value.items()]
        if kind is OrderedDict:
            return {"$ordered_dict": pairs}
        plain = all(type(key) is str and not key.startswith("$") for key, _ in pairs)
        return dict(pairs) if plain else {"$dict": pairs}
    if isinstance(value, Tensor):
        return _tensor_to_json(value, path, leaves)
    raise TypeError(
        f"{path} is a {type_name(kind)} and cannot be saved: allowed are tensors and exactly None, bool, int, float, "
        "str, list, tuple, dict and OrderedDict; convert it to one of them"
    )


def _key_to_json(key: Any, path: str) -> Any:
    leaves: list[_Leaf] = []
    node = _to_json(key, f"{path} (its key {key!r})", leaves)
    if leaves:
        raise TypeError(f"{path} has a tensor as a key and cannot be saved: use a plain value")
    return node


def _tensor_to_json(tensor: Tensor, path: str, leaves: list[_Leaf]) -> dict[str, Any]:
    kind = type(tensor)
    dense = tensor.layout is torch.strided and not tensor.is_nested and not tensor.is_meta
    if not dense or kind not in (Tensor, Parameter) or tensor.dtype not in _DTYPES.values():
        raise TypeError(
            f"{path} is a {type_name(kind)} ({tensor.dtype}, {tensor.layout}, {tensor.device}) and cannot be saved: "
            "allowed are dense tensors in memory, exactly of type Tensor or Parameter, not quantized; convert it"
        )
    node: dict[str, Any] = {"$tensor": None}
    if tensor.requires_grad:
        node["requires_grad"] = True
    if kind is Parameter:
        node["parameter"] = True
    tensor = tensor.detach().resolve_conj().resolve_neg()
    if tensor.numel() == 0:
        tensor = tensor.clone()  # so that it does not point into the memory of another tensor
    leaves.append(_Leaf(path, tensor, node))
    return node


# --- JSON to tree ------------------------------------------------------------------------------------------------


def _from_json(node: Any, load_tensor: Callable[[str], Tensor]) -> Any:
    """The tree of a JSON value; `load_tensor` maps names to tensors."""
    if isinstance(node, list):
        return [_from_json(item, load_tensor) for item in node]
    if not isinstance(node, dict):
        return node
    tag = next(iter(node), "")
    if not tag.startswith("$"):
        return {key: _from_json(item, load_tensor) for key, item in node.items()}
    content = node[tag]
    match tag:
        case "$int":
            return int(content, 16)
        case "$float":
            return float(content)
        case "$str":
            return bytes.fromhex(content).decode("utf-8", "surrogatepass")
        case "$tuple":
            return tuple(_from_json(content, load_tensor))
        case "$dict" | "$ordered_dict":
            pairs = _from_json(content, load_tensor)
            return dict(pairs) if tag == "$dict" else OrderedDict(pairs)
        case "$tensor":
            return _tensor_from_json(node, load_tensor(content))
    raise ValueError(f"{tag!r} is no type that this version of the library knows; use a newer one")


def _tensor_from_json(node: dict[str, Any], tensor: Tensor) -> Tensor:
    if "view" in node:
        name, shape, strides, offset = node["view"]
        view = torch.empty(0, dtype=_DTYPES[name])
        last = offset + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
        inside = offset >= 0 and (last + 1) * view.itemsize <= tensor.untyped_storage().nbytes()
        # torch would silently allocate more memory for a view that is too large.
        if min([0, *shape, *strides]) < 0 or (0 not in shape and not inside):
            raise ValueError(f"a view of shape {shape}, strides {strides}, offset {offset} exceeds its tensor's memory")
        tensor = view.set_(tensor.untyped_storage(), offset, tuple(shape), tuple(strides))
    requires_grad = node.get("requires_grad", False)
    if node.get("parameter", False):
        return Parameter(tensor, requires_grad)
    return tensor.detach().requires_grad_() if requires_grad else tensor


def _join(path: str, key: Any) -> str:
    return f"{path}.{key}" if path else str(key)


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def type_name(kind: type) -> str:
    """The name of a type with its module, such as `numpy.float64`."""
    return f"{kind.__module__}.{kind.__qualname__}"
