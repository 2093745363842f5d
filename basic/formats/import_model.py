"""Other people's models as runs of our own: a Llama that transformers has saved, or a state dict of our names.

A pickle (pytorch_model.bin, *.pt) is opened only when it is asked for, and then by torch's reader for weights alone,
which makes tensors and plain containers of it and refuses everything else.
"""

from __future__ import annotations

import dataclasses
import json
import os
import pickle
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from basic.common.files import atomic_folder
from basic.formats.llama_names import from_hf_rows, hf_name, model_config
from basic.formats.tokenizer_json import load_tokenizer_json
from basic.model import ModelConfig, TransformerLM
from basic.Tokenizer import Tokenizer
from basic.training.batches import check_tokenizer_size
from basic.training.checkpoints.file import save_checkpoint
from basic.training.run_folder import create_run_folder
from basic.training.settings import RunConfig, TrainConfig

_FLOATS = (torch.float32, torch.bfloat16, torch.float16)
_FOLLOWS_FROM_THETA = ".rotary_emb.inv_freq"  # in the files of old versions


def import_hf(
    directory: str | os.PathLike,
    run_dir: str | os.PathLike,
    *,
    context_length: int | None = None,
    with_tokenizer: bool = True,
    unpickle: bool = False,
) -> None:
    """Make a run's folder of a Llama that transformers has saved: it opens like one that was trained here.

    Args:
        directory: with config.json, model.safetensors (or its parts and their index), and tokenizer.json.
        run_dir: must not exist yet, but the folder around it; it appears when it is whole.
        context_length, unpickle: as for `load_hf`.
        with_tokenizer: whether to take the tokenizer over too, which must be byte-level BPE.

    Raises: as `load_hf`, and
        ValueError: the tokenizer is none that ours can be, or does not fit the model.
        FileExistsError: the run's folder is there already.
    """
    directory = Path(directory)
    model = load_hf(directory, context_length=context_length, unpickle=unpickle)
    if with_tokenizer and not (directory / "tokenizer.json").is_file():
        raise FileNotFoundError(f"{directory} has no tokenizer.json; import the model without a tokenizer")
    tokenizer = load_tokenizer_json(directory / "tokenizer.json") if with_tokenizer else None
    train = TrainConfig(steps=1)  # it must say some number; the checkpoint says that none of them was done here
    if tokenizer is not None and (end_of_text := _end_of_text(directory, tokenizer)) is not None:
        train = dataclasses.replace(train, end_of_text=end_of_text)
    _write_run(run_dir, RunConfig(model=model.config, train=train), model, tokenizer)


def import_pt(path: str | os.PathLike, run_dir: str | os.PathLike, config: RunConfig) -> None:
    """Make a run's folder of a state dict with our names that torch.save has written: it is unpickled.

    Args:
        path: of the state dict, or of a dictionary that has it as one of its values.
        run_dir: as for `import_hf`.
        config: the run that it shall be; its tokenizer is copied, if it names one.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file holds more than tensors and plain containers, or not the weights of `config.model`; or the
            tokenizer does not fit the model.
        FileExistsError: the run's folder is there already.
    """
    tokenizer = Tokenizer.load(config.data.tokenizer) if config.data.tokenizer else None
    model = _without_memory(config.model)
    expected = {name: name for name in model.state_dict()}
    found = ((Path(path), name, tensor) for name, tensor in _state_dict_in(path).items())
    _fill(model, _checked_weights(model, expected, found), expected)
    _write_run(run_dir, config, model, tokenizer)


def _write_run(
    run_dir: str | os.PathLike, config: RunConfig, model: TransformerLM, tokenizer: Tokenizer | None
) -> None:
    if tokenizer is not None:
        check_tokenizer_size(tokenizer.vocab_size, model.config.vocab_size, "import the model without it")
    with atomic_folder(run_dir) as folder:
        create_run_folder(folder, config, tokenizer)
        save_checkpoint(model, None, 0, folder / "checkpoints" / "step_00000000.safetensors")


def load_hf(
    directory: str | os.PathLike, *, context_length: int | None = None, unpickle: bool = False
) -> TransformerLM:
    """The model in a folder of transformers, in float32 on the CPU.

    Args:
        directory: with config.json and model.safetensors, or its parts and model.safetensors.index.json.
        context_length: tokens the model shall look at, at most as many as it was made for; None for these.
        unpickle: read pytorch_model.bin (or its parts) instead, with `torch.load(weights_only=True)`.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file is damaged, the model is none that ours can be (the field of config.json is named), or the
            weights are not those of the model (the tensor is named).
    """
    directory = Path(directory)
    path = directory / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"{directory} is no folder of a model that transformers saved: it has no config.json")
    try:
        config = model_config(_read_json(path))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    if context_length is not None:
        if not 1 <= context_length <= config.context_length:
            raise ValueError(
                f"context_length must be 1 to {config.context_length} for this model, got {context_length}"
            )
        config = dataclasses.replace(config, context_length=context_length)
    model = _without_memory(config)
    names = {hf_name(name): name for name in model.state_dict()}
    found = (item for item in _tensors(directory, unpickle) if not item[1].endswith(_FOLLOWS_FROM_THETA))
    weights = _checked_weights(model, names, found)
    _fill(model, {name: from_hf_rows(name, weight, config.d_head) for name, weight in weights.items()}, names)
    return model


def _without_memory(config: ModelConfig) -> TransformerLM:
    """A model that knows its shapes, and draws no weights that would be overwritten."""
    with torch.device("meta"):
        return TransformerLM(config)


def _checked_weights(
    model: TransformerLM, names: dict[str, str], found: Iterable[tuple[Path, str, Tensor]]
) -> dict[str, Tensor]:
    """The weights under our names, in float32; each is one that the model has, in its shape, once.

    Args:
        names: those in the files to ours.
        found: files, names and tensors.
    """
    weights: dict[str, Tensor] = {}
    for file, name, tensor in found:
        if name not in names or names[name] in weights:
            wrong = "a second time" if name in names else "which this model has no place for"
            raise ValueError(f"{file} has {name!r}, of shape {tuple(tensor.shape)}, {wrong}")
        shape = tuple(model.get_parameter(names[name]).shape)
        if tensor.shape != shape or tensor.dtype not in _FLOATS:
            raise ValueError(
                f"{file} has {name!r} as {tensor.dtype} of shape {tuple(tensor.shape)}; this model takes {shape}, in "
                "float32, bfloat16 or float16"
            )
        weights[names[name]] = tensor.float()
    return weights


def _fill(model: TransformerLM, weights: dict[str, Tensor], names: dict[str, str]) -> None:
    """Give the model memory on the CPU, and put all weights into it; of a tied matrix one copy is enough."""
    if model.config.tied_embeddings and "token_embeddings.weight" in weights:
        embedding = weights["token_embeddings.weight"]
        if not torch.equal(weights.setdefault("lm_head.weight", embedding), embedding):
            raise ValueError("the embeddings are tied by the configuration, but differ from lm_head.weight in the file")
    for theirs, ours in names.items():
        if ours not in weights:
            raise ValueError(f"there is no {theirs!r} among the weights, which this model needs")
    model.to_empty(device="cpu")
    if model.config.tied_embeddings:  # to_empty made two of it
        model.lm_head.weight = model.token_embeddings.weight
    model.load_state_dict(weights)


def _tensors(directory: Path, unpickle: bool) -> Iterator[tuple[Path, str, Tensor]]:
    """Each tensor of a folder with its name, and the file that it is in."""
    whole = directory / ("pytorch_model.bin" if unpickle else "model.safetensors")
    index = whole.with_name(f"{whole.name}.index.json")
    if whole.is_file():
        parts = [whole.name]
    elif index.is_file():
        parts = sorted(set(_read_json(index).get("weight_map", {}).values()))
    else:
        hint = ""
        if not unpickle and list(directory.glob("*.bin")):
            hint = "; it has weights as a pickle (*.bin), which is read only when unpickle is asked for"
        raise FileNotFoundError(f"{directory} has neither {whole.name} nor {index.name}{hint}")
    for part in parts:
        if Path(part).name != part:
            raise ValueError(f"{index} names {part!r}, which is not a file beside it")
        for name, tensor in (_unpickled if unpickle else _safetensors)(directory / part):
            yield directory / part, name, tensor


def _safetensors(path: Path) -> Iterator[tuple[str, Tensor]]:
    if not path.is_file():
        raise FileNotFoundError(f"there is no {path}, which the index names")
    try:
        with safe_open(path, framework="pt") as file:
            for name in list(file.keys()):
                yield name, file.get_tensor(name)
    except SafetensorError as error:
        raise ValueError(f"{path} is not a whole safetensors file ({error}); download it again") from error


def _unpickled(path: Path) -> Iterator[tuple[str, Tensor]]:
    """The state dict that a file of torch.save holds."""
    content = _unpickle(path)
    if not isinstance(content, dict) or not all(isinstance(value, Tensor) for value in content.values()):
        raise ValueError(f"{path} must hold a dictionary from names to tensors")
    yield from content.items()


def _state_dict_in(path: str | os.PathLike) -> dict[str, Tensor]:
    """The state dict with our names in a file of torch.save, be it a part of the content, or of a wrapped model."""
    content = _unpickle(path)
    parts = [content, *content.values()] if isinstance(content, dict) else []
    for part in parts:
        if isinstance(part, dict) and all(isinstance(value, Tensor) for value in part.values()):
            # torch.compile and DistributedDataParallel put these in front.
            names = {name: name.removeprefix("module.").removeprefix("_orig_mod.") for name in map(str, part)}
            if "token_embeddings.weight" in names.values():
                return {names[str(name)]: tensor for name, tensor in part.items()}
    raise ValueError(f"{path} holds no state dict with a token_embeddings.weight")


def _unpickle(path: str | os.PathLike) -> Any:
    """What torch.save wrote, if it is tensors, plain values and containers; torch refuses whatever could run code."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"{path} is damaged, or holds more than tensors and plain containers ({reason})") from error


def _end_of_text(directory: Path, tokenizer: Tokenizer) -> str | None:
    """The special token that ends a text, by generation_config.json, or else config.json."""
    texts = {token_id: text for text, token_id in tokenizer.special_token_ids.items()}
    for name in ("generation_config.json", "config.json"):
        if (directory / name).is_file():
            ids = _read_json(directory / name).get("eos_token_id")
            for token_id in ids if isinstance(ids, list) else [ids]:
                if token_id in texts:
                    return texts[token_id]
    return None


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error}); download it again") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold a JSON object, got {type(content).__name__}")
    return content
