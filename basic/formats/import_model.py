"""Open the models of other programs, and import them as runs.

They are a folder in Hugging Face format or a GGUF file, of Llama and its relatives; or a state dict with our parameter
names.

Pickles (pytorch_model.bin, *.pt) are opened only on request, and then by `torch.load(weights_only=True)`, which creates
only tensors and plain containers and refuses everything else.
"""

from __future__ import annotations

import dataclasses
import os
import pickle
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from basic.common.errors import DamagedFileError, InvalidInputError
from basic.common.file_sets import check_files
from basic.common.files import atomic_folder, check_regular_file, load_json_object
from basic.common.outputs import Output, check_outputs, reserved_outputs
from basic.formats.gguf_file import GGUFFile, is_gguf
from basic.formats.gguf_names import ROPE_DIVISORS, gguf_config, gguf_name
from basic.formats.gguf_tokenizer import read_gguf_tokenizer
from basic.formats.hf_names import from_hf_row_order, hf_name, model_config
from basic.model import ModelConfig, TransformerLM
from basic.Tokenizer import Tokenizer
from basic.training.batches import check_tokenizer_size
from basic.training.checkpoints.file import save_checkpoint
from basic.training.checkpoints.state import without_wrappers
from basic.training.run_folder import create_run_folder, model_for_checks
from basic.training.settings import RunConfig, TrainConfig

_FLOATS = (torch.float32, torch.bfloat16, torch.float16)
_ROPE_BUFFER = ".rotary_emb.inv_freq"  # in files of old versions; it follows from rope_theta


class OpenedModel(NamedTuple):
    """A model of another program, in float32 on the CPU."""

    model: TransformerLM
    tokenizer: Tokenizer | None
    end_of_text: str | None
    """The special token that ends a text, if the model names one that its tokenizer has."""


def open_model(
    source: str | os.PathLike, *, context_length: int | None = None, with_tokenizer: bool = True, unpickle: bool = False
) -> OpenedModel:
    """Load a model of another program with its tokenizer.

    Args:
        source: a folder in Hugging Face format, or a GGUF file, whose weights are dequantized.
        context_length: a shorter context length for the model; None: the one in the file.
        with_tokenizer: also load the tokenizer, which must be byte-level BPE.
        unpickle: of a folder, read pytorch_model.bin (or its shards) in place of model.safetensors (or its shards).

    Raises:
        FileNotFoundError: a file is missing.
        DamagedFileError: a file is incomplete or not of its format.
        InvalidInputError: our model cannot represent the model, or our tokenizer the tokenizer (the message names the
            field), a weight does not match the configuration (the message names the tensor), or the package gguf is
            missing.
        WrongTokenizerError: the tokenizer has more ids than the model.
    """
    tokenizer = None
    if is_gguf(source):
        file = GGUFFile(source)
        if with_tokenizer:
            tokenizer = read_gguf_tokenizer(file.fields)
        model = _load_gguf(file, context_length)
        end_ids: list[Any] = [file.fields.get("tokenizer.ggml.eos_token_id")]
    else:
        directory = Path(source)
        model = _load_hf(directory, context_length, unpickle)
        if with_tokenizer:
            tokenizer = _load_tokenizer(directory)
        end_ids = _end_ids(directory)
    if tokenizer is None:
        return OpenedModel(model, None, None)
    check_tokenizer_size(tokenizer.vocab_size, model.config.vocab_size, "import the model without it")
    texts = {token_id: text for text, token_id in tokenizer.special_token_ids.items()}
    return OpenedModel(model, tokenizer, next((texts[i] for i in end_ids if type(i) is int and i in texts), None))


def load_model(
    source: str | os.PathLike, *, context_length: int | None = None, unpickle: bool = False
) -> TransformerLM:
    """Load a model of another program without its tokenizer; arguments and errors are those of `open_model`."""
    return open_model(source, context_length=context_length, with_tokenizer=False, unpickle=unpickle).model


def import_run(source: str | os.PathLike, run_dir: str | os.PathLike, **options: Any) -> None:
    """Convert a model of another program to a run folder, which opens like that of a model trained here.

    Args:
        source: as for `open_model`.
        run_dir: must not exist; its parent folder must. It appears when it is complete.
        options: the other arguments of `open_model`.

    Raises:
        FileNotFoundError, DamagedFileError, InvalidInputError, WrongTokenizerError: as for `open_model`.
        FileExistsError: the run folder exists.
    """
    check_outputs([Output(run_dir, "a run", is_folder=True)], inputs=[source])
    model, tokenizer, end_of_text = open_model(source, **options)
    train = TrainConfig(steps=1)  # a required setting; the checkpoint is at step 0
    if end_of_text is not None:
        train = dataclasses.replace(train, end_of_text=end_of_text)
    _write_run(run_dir, RunConfig(model=model.config, train=train), model, tokenizer)


import_hf = import_run
"""The name from when it opened only folders in Hugging Face format."""


def import_pt(path: str | os.PathLike, run_dir: str | os.PathLike, config: RunConfig) -> None:
    """Convert a state dict with our parameter names, written by torch.save, to a run folder. The file is unpickled.

    Args:
        path: contains the state dict, or a dictionary with it among its values.
        run_dir: as for `import_run`.
        config: configuration of the run; the tokenizer that it names is copied.

    Raises:
        FileNotFoundError: the file does not exist.
        DamagedFileError: the file holds more than tensors and plain containers.
        InvalidInputError: the weights do not match `config.model`.
        WrongTokenizerError: the tokenizer has more ids than the model.
        FileExistsError: the run folder exists.
    """
    check_outputs([Output(run_dir, "a run", is_folder=True)], inputs=[path])
    tokenizer = Tokenizer.load(config.data.tokenizer) if config.data.tokenizer else None
    if tokenizer is not None:
        check_tokenizer_size(tokenizer.vocab_size, config.model.vocab_size, "import the model without it")
    state = _read_state_dict(path)
    model = model_for_checks(config.model, _count_blocks(state), Path("the configuration"))
    names = {name: name for name in model.state_dict()}
    weights = _match_weights(model, names, ((Path(path), name, tensor) for name, tensor in state.items()))
    _write_run(run_dir, config, _load_weights(config.model, weights, names), tokenizer)


def _write_run(
    run_dir: str | os.PathLike, config: RunConfig, model: TransformerLM, tokenizer: Tokenizer | None
) -> None:
    with reserved_outputs([Output(run_dir, "a run", is_folder=True)]), atomic_folder(run_dir) as folder:
        create_run_folder(folder, config, tokenizer)
        save_checkpoint(model, None, 0, folder / "checkpoints" / "step_00000000.safetensors")


def _load_hf(directory: Path, context_length: int | None, unpickle: bool) -> TransformerLM:
    """Load a model in Hugging Face format, in float32 on the CPU."""
    path = directory / "config.json"
    if not path.is_file():
        hint = "; it is a run, which load_run opens" if (directory / "config.toml").is_file() else ""
        raise FileNotFoundError(f"{directory} is not a model folder of transformers: it has no config.json{hint}")
    check_files(directory)  # of an export of ours
    fields = load_json_object(path)
    try:
        config = model_config(fields)
    except InvalidInputError as error:
        raise InvalidInputError(f"{path}: {error}") from error
    config = _shortened(config, context_length)
    files = _weight_files(directory, unpickle)
    saved = [(file, *item) for file in files for item in (_read_pickle if unpickle else _read_safetensors)(file)]
    model = model_for_checks(config, _count_blocks(name.removeprefix("model.") for _, name, _ in saved), path)
    names = {hf_name(name, config.norm): name for name in model.state_dict()}
    weights = _match_weights(model, names, (each for each in saved if not each[1].endswith(_ROPE_BUFFER)))
    ordered = {name: from_hf_row_order(name, weight, config.d_head) for name, weight in weights.items()}
    return _load_weights(config, ordered, names)


def _load_gguf(file: GGUFFile, context_length: int | None) -> TransformerLM:
    """Load a model of a GGUF file, in float32 on the CPU."""
    special = dict(file.tensors(["token_embd.weight", ROPE_DIVISORS]))
    if "token_embd.weight" not in special:
        raise InvalidInputError(f"{file.path} has no tensor 'token_embd.weight'")
    divisors = torch.from_numpy(special[ROPE_DIVISORS].copy()) if ROPE_DIVISORS in special else None
    embedding_rows, tied = len(special["token_embd.weight"]), "output.weight" not in file.names
    try:
        config = _shortened(gguf_config(file.fields, embedding_rows, divisors, tied), context_length)
    except InvalidInputError as error:
        raise InvalidInputError(f"{file.path}: {error}") from error
    saved = [name.replace("blk.", "layers.", 1) for name in file.names]
    model = model_for_checks(config, _count_blocks(saved), file.path)
    names = {gguf_name(name): name for name in model.state_dict()}
    tensors = ((file.path, name, torch.from_numpy(values)) for name, values in file.tensors() if name != ROPE_DIVISORS)
    weights = _match_weights(model, names, tensors)
    if file.fields["general.architecture"] != "llama":
        weights = {name: from_hf_row_order(name, weight, config.d_head) for name, weight in weights.items()}
    return _load_weights(config, weights, names)


def _shortened(config: ModelConfig, context_length: int | None) -> ModelConfig:
    """The configuration with a shorter context length."""
    if context_length is None:
        return config
    if not 1 <= context_length <= config.context_length:
        raise InvalidInputError(
            f"context_length must be 1 to {config.context_length} for this model, got {context_length}"
        )
    return dataclasses.replace(config, context_length=context_length)


def _count_blocks(names: Iterable[str]) -> int:
    """The number of blocks of a model whose weights have these names, `layers.3.` and so on."""
    return len({name.split(".")[1] for name in names if name.startswith("layers.")})


def _match_weights(
    model: TransformerLM, names: dict[str, str], tensors: Iterable[tuple[Path, str, Tensor]]
) -> dict[str, Tensor]:
    """Rename weights to our names and convert them to float32, after checking names, shapes and dtypes."""
    weights: dict[str, Tensor] = {}
    for file, name, tensor in tensors:
        if name not in names or names[name] in weights:
            problem = "a second time" if name in names else "which is not a weight of this model"
            raise InvalidInputError(f"{file} has {name!r}, of shape {tuple(tensor.shape)}, {problem}")
        shape = tuple(model.get_parameter(names[name]).shape)
        if tensor.shape != shape or tensor.dtype not in _FLOATS:
            raise InvalidInputError(
                f"{file} has {name!r} as {tensor.dtype} of shape {tuple(tensor.shape)}; this model takes {shape}, in "
                "float32, bfloat16 or float16"
            )
        weights[names[name]] = tensor.float()
    return weights


def _load_weights(config: ModelConfig, weights: dict[str, Tensor], names: dict[str, str]) -> TransformerLM:
    """Create the model on the CPU and load all weights; a tied output matrix may be missing."""
    if config.tied_embeddings and "token_embeddings.weight" in weights:
        embedding = weights["token_embeddings.weight"]
        if not torch.equal(weights.setdefault("lm_head.weight", embedding), embedding):
            raise InvalidInputError(
                "the embeddings are tied by the configuration, but differ from lm_head.weight in the file"
            )
    for file_name, name in names.items():
        if name not in weights:
            raise InvalidInputError(f"the weights lack {file_name!r}, which this model needs")
    try:
        with torch.device("meta"):  # without initializing the weights
            model = TransformerLM(config)
        model.to_empty(device="cpu")
    except (MemoryError, OverflowError, RuntimeError) as error:
        raise InvalidInputError(
            f"the model does not fit into memory, with positions for context_length = {config.context_length}; give a "
            f"shorter one ({str(error).splitlines()[0]})"
        ) from error
    if config.tied_embeddings:  # to_empty separated the two
        model.lm_head.weight = model.token_embeddings.weight
    model.load_state_dict(weights)
    return model


def _weight_files(directory: Path, unpickle: bool) -> list[Path]:
    """The files with the weights of a model."""
    single_file = directory / ("pytorch_model.bin" if unpickle else "model.safetensors")
    index = single_file.with_name(f"{single_file.name}.index.json")
    if single_file.is_file():
        shards = [single_file.name]
    elif index.is_file():
        weight_map = load_json_object(index).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(shard, str) for shard in weight_map.values()):
            raise DamagedFileError(f"{index} must hold the name of a file for each weight as 'weight_map'")
        shards = sorted(set(weight_map.values()))
    else:
        hint = ""
        if not unpickle and list(directory.glob("*.bin")):
            hint = "; it has weights as a pickle (*.bin), which is read only when unpickle is asked for"
        raise FileNotFoundError(f"{directory} has neither {single_file.name} nor {index.name}{hint}")
    for shard in shards:
        if Path(shard).name != shard:
            raise InvalidInputError(f"{index} names {shard!r}, which is not a file beside it")
    return [directory / shard for shard in shards]


def _read_safetensors(path: Path) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors of a file, which are views of it: they are read when they are used."""
    if not path.is_file():
        raise FileNotFoundError(f"there is no {path}, which the index names")
    try:
        with safe_open(path, framework="pt") as file:
            yield from [(name, file.get_tensor(name)) for name in list(file.keys())]
    except SafetensorError as error:
        raise DamagedFileError(f"{path} is not a complete safetensors file ({error}); download it again") from error


def _read_pickle(path: Path) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors of a state dict that torch.save wrote."""
    content = _load_pickle(path)
    if not isinstance(content, dict) or not all(isinstance(value, Tensor) for value in content.values()):
        raise DamagedFileError(f"{path} must hold a dictionary from names to tensors")
    yield from content.items()


def _read_state_dict(path: str | os.PathLike) -> dict[str, Tensor]:
    """Return the state dict with our names in a file of torch.save: its content, or one of its values."""
    content = _load_pickle(path)
    candidates = [content, *content.values()] if isinstance(content, dict) else []
    for candidate in candidates:
        if isinstance(candidate, dict) and all(isinstance(value, Tensor) for value in candidate.values()):
            weights = {without_wrappers(str(name)): tensor for name, tensor in candidate.items()}
            if "token_embeddings.weight" in weights:
                return weights
    found = [str(name) for candidate in candidates if isinstance(candidate, dict) for name in candidate]
    raise InvalidInputError(
        f"{path} holds no state dict with a token_embeddings.weight, but {', '.join(found[:4]) or 'no names'}; give "
        "the weights the names of TransformerLM.state_dict()"
    )


def _load_pickle(path: str | os.PathLike) -> Any:
    """Load tensors, plain values and containers that torch.save wrote; anything that could run code is refused."""
    check_regular_file(path)
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        reason = str(error).splitlines()[0]
        message = f"{path} is damaged, or holds more than tensors and plain containers ({reason})"
        raise DamagedFileError(message) from error


def _end_ids(directory: Path) -> list[Any]:
    """The ids that may be the EOS token, those of generation_config.json first."""
    ids: list[Any] = []
    for name in ("generation_config.json", "config.json"):
        if (directory / name).is_file():
            found = load_json_object(directory / name).get("eos_token_id")
            ids += found if isinstance(found, list) else [found]
    return ids


def _load_tokenizer(directory: Path) -> Tokenizer:
    try:
        return Tokenizer.load(directory)
    except FileNotFoundError:
        raise FileNotFoundError(
            f"{directory} has no tokenizer.json; add it, or import the model without a tokenizer (--no-tokenizer)"
        ) from None
