"""A tree of tensors and plain values as JSON text and named tensors, and back, types and shared memory included.

This is how state dicts travel without pickle. What JSON has (null, true, numbers, text, lists, objects) stands
for itself; 1 is an int and 1.0 a float. The rest is an object whose first key begins with a dollar sign:

    {"$tuple": [items]}                     a tuple
    {"$dict": [[key, value], ...]}          a dict with keys other than strings, or with strings that begin with "$"
    {"$ordered_dict": [[key, value], ...]}  an OrderedDict
    {"$int": "0x..."}                       an integer beyond 64 bits
    {"$float": "inf" | "-inf" | "nan"}      a float that JSON lacks
    {"$str": "hexadecimal"}                 a string with lone surrogates, as UTF-8 that lets them pass
    {"$tensor": "name"}                     the tensor of that name; further keys may say more:
        "view": [dtype, shape, strides, offset]
                                            a view of its memory (strides and offset count elements of dtype)
        "requires_grad": true, "parameter": true
                                            what it was in Python

A tensor is named after its place in the tree, such as `model.layers.0.ln1.weight`. Tensors that share memory are
stored once. The others are views of the one that covers them all or, if none does, of a row of bytes (uint8);
tensors of a dtype that safetensors does not know are views of bytes too.
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

# Dtypes that every version of safetensors in use can name; the others are stored as bytes.
_NAMED_DTYPES = {
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2),
    *(torch.int64, torch.int32, torch.int16, torch.int8, torch.bool),
    *(torch.uint64, torch.uint32, torch.uint16, torch.uint8),
}
_OTHER_DTYPES = {
    *(torch.complex128, torch.complex64, torch.complex32),
    *(torch.float8_e4m3fnuz, torch.float8_e5m2fnuz, torch.float8_e8m0fnu, torch.float4_e2m1fn_x2),
}


def dtype_name(dtype: torch.dtype) -> str:
    """A dtype without the name of torch, such as `float32`."""
    return str(dtype).removeprefix("torch.")


_DTYPES = {dtype_name(dtype): dtype for dtype in _NAMED_DTYPES | _OTHER_DTYPES}


def pack(tree: Any, to_host: Callable[[Tensor], Tensor] = Tensor.cpu) -> tuple[Any, dict[str, Tensor]]:
    """Take a tree apart into what JSON can hold and the tensors to be stored.

    Args:
        tree: dicts, lists and tuples of tensors and plain values, nested as you like.
        to_host: makes of a contiguous tensor on any device what is returned of it.

    Returns:
        An object for `json.dumps`, and contiguous CPU tensors by name, no two of which share memory. Tensors that
        are so already are not copied.

    Raises:
        TypeError: something is neither a dense tensor in memory nor exactly None, bool, int, float, str, list,
            tuple, dict or OrderedDict; its place in the tree is named.
    """
    leaves: list[_Leaf] = []
    node = _encode(tree, "", leaves)
    return node, _store(leaves, to_host)


def unpack(node: Any, tensors: Mapping[str, Tensor]) -> Any:
    """Put a tree, or a part of one, together again; the tensors are copied, so that they own their memory.

    Raises:
        LookupError, TypeError, ValueError: the node was not made by `pack`.
    """
    return _decode(node, functools.cache(lambda name: tensors[name].clone()))


def stored_names(node: Any) -> dict[str, str]:
    """Of a dictionary that holds tensors alone: under which name each of them is stored."""
    items = node["$ordered_dict"] if "$ordered_dict" in node else node.items()
    return {key: tensor["$tensor"] for key, tensor in items}


@dataclass
class _Leaf:
    """A tensor in a tree, and the object of the document that shall say where the file has it."""

    path: str
    tensor: Tensor
    node: dict[str, Any]

    @property
    def view(self) -> tuple[str, tuple[int, ...], tuple[int, ...], int]:
        """How it lies in its storage: dtype, shape, strides, offset; the last two in elements."""
        tensor = self.tensor
        return dtype_name(tensor.dtype), tuple(tensor.shape), tensor.stride(), int(tensor.storage_offset())

    @property
    def span(self) -> tuple[int, int]:
        """The bytes of its storage from its first element to its last."""
        _, shape, strides, offset = self.view
        extent = 0
        if self.tensor.numel() > 0:
            extent = 1 + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
        return offset * self.tensor.itemsize, (offset + extent) * self.tensor.itemsize


def _store(leaves: list[_Leaf], to_host: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
    """The contiguous CPU tensors to write, by name; tells each leaf where to find itself in them."""
    tensors: dict[str, Tensor] = {}
    for cluster in _clusters(leaves):
        if len({leaf.view for leaf in cluster}) == 1:
            whole = cluster[0].tensor.contiguous()
            for leaf in cluster:
                leaf.tensor = whole
        begin = min(leaf.span[0] for leaf in cluster)
        end = max(leaf.span[1] for leaf in cluster)
        base = _covering(cluster, begin, end)
        name = (base or cluster[0]).path.encode("utf-8", "backslashreplace").decode()
        while name in tensors:  # the paths of {1: ...} and {"1": ...} look alike
            name += "~"
        if base is not None:
            tensors[name] = to_host(base.tensor)
        else:
            begin -= begin % 16  # so that the offset of every view is a whole number of its elements
            tensors[name] = _bytes_of(cluster[0].tensor, begin, end)
        for leaf in cluster:
            leaf.node["$tensor"] = name
            if base is None or leaf.view != base.view:
                dtype, shape, strides, _ = leaf.view
                leaf.node["view"] = [dtype, shape, strides, (leaf.span[0] - begin) // leaf.tensor.itemsize]
    return tensors


def _clusters(leaves: list[_Leaf]) -> Iterator[list[_Leaf]]:
    """Groups of tensors whose spans overlap. Those that share a storage side by side, such as the weights of an
    LSTM on a GPU, are not among them: each can be stored by itself."""
    by_storage: dict[tuple[torch.device, int], list[_Leaf]] = {}
    for leaf in leaves:
        key = leaf.tensor.device, leaf.tensor.untyped_storage().data_ptr()
        by_storage.setdefault(key, []).append(leaf)
    for sharing in by_storage.values():
        sharing.sort(key=lambda leaf: leaf.span[0])
        cluster, cluster_end = [sharing[0]], sharing[0].span[1]
        for leaf in sharing[1:]:
            if leaf.span[0] >= cluster_end:
                yield cluster
                cluster = []
            cluster.append(leaf)
            cluster_end = max(cluster_end, leaf.span[1])
        yield cluster


def _covering(cluster: list[_Leaf], begin: int, end: int) -> _Leaf | None:
    """A contiguous tensor of which all others are views, if there is one and safetensors knows its dtype."""
    if len({leaf.tensor.dtype for leaf in cluster}) > 1 or cluster[0].tensor.dtype not in _NAMED_DTYPES:
        return None
    return next((leaf for leaf in cluster if leaf.span == (begin, end) and leaf.tensor.is_contiguous()), None)


def _bytes_of(tensor: Tensor, begin: int, end: int) -> Tensor:
    """A copy of some bytes of a tensor's storage, on the CPU."""
    memory = torch.empty(0, dtype=torch.uint8, device=tensor.device)
    return memory.set_(tensor.untyped_storage(), begin, (end - begin,), (1,)).cpu().clone()


def _encode(value: Any, path: str, leaves: list[_Leaf]) -> Any:
    """The JSON of a tree; its tensors are added to `leaves`. Types are compared exactly: a subclass such as
    np.float64 or IntEnum would come back as something else."""
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
        items = [_encode(item, _join(path, place), leaves) for place, item in enumerate(value)]
        return items if kind is list else {"$tuple": items}
    if kind is dict or kind is OrderedDict:
        pairs = [[_encode_key(key, path), _encode(item, _join(path, key), leaves)] for key, item in value.items()]
        if kind is OrderedDict:
            return {"$ordered_dict": pairs}
        plain = all(type(key) is str and not key.startswith("$") for key, _ in pairs)
        return dict(pairs) if plain else {"$dict": pairs}
    if isinstance(value, Tensor):
        return _encode_tensor(value, path, leaves)
    raise TypeError(
        f"{path} is a {type_name(kind)} and cannot be saved: allowed are tensors and exactly None, bool, int, float, "
        "str, list, tuple, dict and OrderedDict; convert it to one of them"
    )


def _encode_key(key: Any, path: str) -> Any:
    leaves: list[_Leaf] = []
    node = _encode(key, f"{path} (its key {key!r})", leaves)
    if leaves:
        raise TypeError(f"{path} has a tensor as a key and cannot be saved: use a plain value")
    return node


def _encode_tensor(tensor: Tensor, path: str, leaves: list[_Leaf]) -> dict[str, Any]:
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
        tensor = tensor.clone()  # of no memory at all, rather than a place in the middle of another's
    leaves.append(_Leaf(path, tensor, node))
    return node


def _decode(node: Any, stored: Callable[[str], Tensor]) -> Any:
    """The tree of some JSON; `stored` gives tensors by their names."""
    if isinstance(node, list):
        return [_decode(item, stored) for item in node]
    if not isinstance(node, dict):
        return node
    tag = next(iter(node), "")
    if not tag.startswith("$"):
        return {key: _decode(item, stored) for key, item in node.items()}
    content = node[tag]
    match tag:
        case "$int":
            return int(content, 16)
        case "$float":
            return float(content)
        case "$str":
            return bytes.fromhex(content).decode("utf-8", "surrogatepass")
        case "$tuple":
            return tuple(_decode(content, stored))
        case "$dict" | "$ordered_dict":
            pairs = _decode(content, stored)
            return dict(pairs) if tag == "$dict" else OrderedDict(pairs)
        case "$tensor":
            return _decode_tensor(node, stored(content))
    raise ValueError(f"{tag!r} is no type that this version of the library knows; use a newer one")


def _decode_tensor(node: dict[str, Any], tensor: Tensor) -> Tensor:
    if "view" in node:
        name, shape, strides, offset = node["view"]
        view = torch.empty(0, dtype=_DTYPES[name])
        last = offset + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
        inside = offset >= 0 and (last + 1) * view.itemsize <= tensor.untyped_storage().nbytes()
        if min([0, *shape, *strides]) < 0 or (0 not in shape and not inside):  # torch would take more memory silently
            raise ValueError(f"a view of shape {shape} and strides {strides} at {offset} leaves its tensor's memory")
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
    """A type with its module, such as `numpy.float64`."""
    return f"{kind.__module__}.{kind.__qualname__}"
