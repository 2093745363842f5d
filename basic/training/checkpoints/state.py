"""The state of a model and an optimizer: collect it for a checkpoint, check that it fits, and load it."""

from __future__ import annotations

import itertools
import operator
from typing import Any

from torch import Tensor
from torch.nn import Module
from torch.optim import Optimizer

from basic.common.errors import InvalidInputError
from basic.training.checkpoints.tensor_tree import dtype_name, type_name

VERSION = 2
"""Of the tree that `collect_state` returns."""


def collect_state(model: Module, optimizer: Optimizer | None, iteration: int, extra: dict | None) -> dict[str, Any]:
    """Everything that a checkpoint holds, as a tree of tensors and plain values; the tensors are not copied."""
    model_state = model.state_dict()
    return {
        "version": VERSION,
        "iteration": operator.index(iteration),
        "model": dict(model_state),
        "model_metadata": getattr(model_state, "_metadata", None),
        "optimizer": None if optimizer is None else optimizer.state_dict(),
        "optimizer_class": None if optimizer is None else _class_name(optimizer),
        "extra": {} if extra is None else extra,
    }


# torch.compile, DistributedDataParallel, FSDP and activation checkpointing put parameters' names behind these.
_WRAPPERS = ("_orig_mod", "module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")


def without_wrappers(key: str) -> str:
    """The key of a state dict without what wrappers of modules add to it, anywhere in it."""
    return ".".join(name for name in key.split(".") if name not in _WRAPPERS)


# --- Model -------------------------------------------------------------------------------------------------------


def rename_wrapped_keys(model: Module, saved: dict[str, Any]) -> None:
    """Rename the keys of a saved state dict to those of a model, in place, where only wrappers differ.

    So a checkpoint of a compiled or distributed model fits the plain model, and the reverse.
    """
    own: Any = model.state_dict()
    own_keys = {without_wrappers(key): key for key in own}
    renamed = {own_keys.get(without_wrappers(key), key): value for key, value in saved.items()}
    if saved.keys() == renamed.keys() or len(renamed) < len(saved):
        return
    saved.clear()
    saved.update(renamed)
    if metadata := getattr(saved, "_metadata", None):  # the format version of each module; wrappers come before it
        versions = {without_wrappers(key): version for key, version in metadata.items()}
        own_modules = {key: versions.get(without_wrappers(key)) for key in own._metadata}
        saved._metadata = {key: version for key, version in own_modules.items() if version is not None}  # ty: ignore


def check_model_state(model: Module, saved: dict[str, Any]) -> None:
    """Check that a saved state dict fits a module.

    Raises:
        InvalidInputError: a key, shape or dtype differs; the message names the first one that does.
    """
    own = model.state_dict()
    check_shapes(own, saved)
    for key, value in own.items():
        if isinstance(value, Tensor) and value.is_meta:
            raise InvalidInputError(f"{key!r} of the model is on the meta device and has no memory; use to_empty first")


def check_shapes(own: dict[str, Any], saved: dict[str, Any]) -> None:
    """Check that a saved state dict has the keys, shapes and dtypes of a module's own, as `check_model_state` does."""
    for key, value in own.items():
        if key not in saved:
            raise InvalidInputError(
                f"the checkpoint does not fit the model: it has no {key!r} ({_describe(value)} in the model); build "
                "the model as it was saved"
            )
        saved_value = saved[key]
        if key.endswith("_extra_state") or not isinstance(value, Tensor) or _is_lazy(value):
            continue  # only the module itself can check these
        if not isinstance(saved_value, Tensor) or (saved_value.shape, saved_value.dtype) != (value.shape, value.dtype):
            raise InvalidInputError(
                f"the checkpoint does not fit the model: {key!r} is {_describe(saved_value)} in the checkpoint, but "
                f"{_describe(value)} in the model; build the model as it was saved, in its dtype"
            )
    for key in saved:
        if key not in own:
            raise InvalidInputError(
                f"the checkpoint does not fit the model, which has no {key!r} ({_describe(saved[key])} in the "
                "checkpoint); build the model as it was saved"
            )


def load_model_state(model: Module, saved: dict[str, Any]) -> None:
    """Load a state dict that `check_model_state` has accepted."""
    for tensor in itertools.chain(model.parameters(), model.buffers()):
        # torch refuses to load into an expanded tensor: give it memory for each of its elements.
        if not _is_lazy(tensor) and any(
            size > 1 and stride == 0 for size, stride in zip(tensor.shape, tensor.stride(), strict=True)
        ):
            tensor.data = tensor.data.clone()
    model.load_state_dict(saved)


def _is_lazy(tensor: Tensor) -> bool:
    """Whether it belongs to a lazy module: it has no shape yet, and takes the shape of what is loaded."""
    return hasattr(type(tensor), "materialize")


def _describe(value: Any) -> str:
    if not isinstance(value, Tensor):
        return f"a {type_name(type(value))}"
    return f"{dtype_name(value.dtype)} of shape {tuple(value.shape)}"


# --- Optimizer ---------------------------------------------------------------------------------------------------


_OTHER_OPTIMIZER = (
    "build the optimizer as it was saved (a run is resumed with the optimizer that it began with), or take the weights "
    "alone (optimizer=None; for a new run, init_from)"
)


def check_optimizer_state(optimizer: Optimizer, saved: dict[str, Any] | None, saved_class: str | None) -> None:
    """Check that a saved optimizer state is of an optimizer's class, and has its parameter groups.

    Args:
        saved_class: `optimizer_class` of the checkpoint; None if it does not say it, as those of earlier versions. Then
            the groups must have the numbers that the optimizer needs.

    Raises:
        InvalidInputError: there is no state, or it is of another class, or has other groups.
    """
    if saved is None:
        raise InvalidInputError("the checkpoint was saved without an optimizer; load it with optimizer=None")
    own_class = _class_name(optimizer)
    if saved_class is not None and saved_class != own_class:
        raise InvalidInputError(
            f"the checkpoint does not fit the optimizer: it has the state of {saved_class}, but this is {own_class}; "
            f"{_OTHER_OPTIMIZER}"
        )
    saved_sizes = [len(group["params"]) for group in saved.get("param_groups", [])]
    own_sizes = [len(group["params"]) for group in optimizer.state_dict().get("param_groups", [])]
    if saved_sizes != own_sizes:
        raise InvalidInputError(
            f"the checkpoint does not fit the optimizer: its parameter groups have {saved_sizes} parameters, those of "
            f"the optimizer {own_sizes}; build the optimizer as it was saved"
        )
    if saved_class is not None:
        return
    # Not switches and None: newer versions of PyTorch have added such settings, and load a state without them.
    needed = [name for name, value in optimizer.defaults.items() if type(value) in (int, float, tuple)]
    for group in saved.get("param_groups", []):
        for name in needed:
            if name not in group:
                raise InvalidInputError(
                    f"the checkpoint does not fit the optimizer: {own_class} needs {name!r}, but the saved state, "
                    f"which is of another optimizer, has {', '.join(key for key in group if key != 'params')}; "
                    f"{_OTHER_OPTIMIZER}"
                )


def _class_name(optimizer: Optimizer) -> str:
    """Such as torch.AdamW, or basic.AdamW for ours; others without a package, as a user's script may be renamed."""
    package = type(optimizer).__module__.partition(".")[0]
    return f"{package}." * (package in ("torch", "basic")) + type(optimizer).__name__


def load_optimizer_state(optimizer: Optimizer, saved: dict[str, Any]) -> None:
    """Load the state of an optimizer, and undo the casts that torch applies.

    `Optimizer.load_state_dict` casts every state tensor except `step` to the dtype of its parameter, for example
    integers, and the float32 moments of bfloat16 parameters. It also turns strings into sequences. It does move tensors
    to the right devices.
    """
    groups = saved.get("param_groups", [])
    for own_group, saved_group in zip(optimizer.param_groups, groups, strict=False):
        for key, value in saved_group.items():
            if isinstance(value, Tensor) and isinstance(own_group.get(key), Tensor):
                saved_group[key] = value.to(own_group[key].device)
    optimizer.load_state_dict(saved)
    loaded = optimizer.state_dict().get("state", {})
    ids = itertools.chain.from_iterable(group["params"] for group in groups)
    parameters = itertools.chain.from_iterable(group["params"] for group in optimizer.param_groups)
    for key, parameter in zip(ids, parameters, strict=False):
        # If the optimizer saves its state in another form than it keeps in memory, only it can restore the state.
        if key in saved["state"] and key in loaded and loaded[key] is optimizer.state.get(parameter):
            optimizer.state[parameter] = _without_casts(saved["state"][key], loaded[key])


def _without_casts(saved: Any, loaded: Any) -> Any:
    """`saved`, with its tensors on the devices of those in `loaded`; a tensor of `loaded` where its dtype is right."""
    if isinstance(saved, Tensor) and isinstance(loaded, Tensor):
        return loaded if saved.dtype == loaded.dtype else saved.to(loaded.device)
    if isinstance(saved, dict) and isinstance(loaded, dict):
        return type(saved)((key, _without_casts(value, loaded.get(key))) for key, value in saved.items())
    if isinstance(saved, (list, tuple)) and isinstance(loaded, (list, tuple)):
        return type(saved)(_without_casts(*pair) for pair in zip(saved, loaded, strict=True))
    return saved
