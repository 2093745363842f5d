"""Export a model: a Hugging Face folder, which transformers opens, or a GGUF file, for llama.cpp and Ollama."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from typing import Any, Literal

import numpy as np
import torch

from basic.chat import ChatFormat
from basic.common.errors import InvalidInputError
from basic.common.file_sets import write_checksums
from basic.common.files import atomic_folder, atomic_paths, write_json
from basic.common.outputs import Output, check_outputs, reserved_outputs
from basic.formats.gguf_file import write_gguf
from basic.formats.gguf_names import ROPE_DIVISORS, ROPE_SCALING, gguf_fields, gguf_name, rope_divisors
from basic.formats.gguf_tokenizer import gguf_tokenizer_fields
from basic.formats.hf_names import hf_config, hf_name, to_hf_row_order
from basic.formats.tokenizers import save_tokenizer_json
from basic.model import TransformerLM
from basic.Tokenizer import Tokenizer
from basic.training.batches import check_tokenizer_size
from basic.training.checkpoints.file import disk_errors, save_safetensors

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_TOO_MANY_IDS = "export the model with the tokenizer it was trained with"


def export_hf(
    model: TransformerLM,
    directory: str | os.PathLike,
    tokenizer: Tokenizer | None = None,
    *,
    end_of_text: str = "<|endoftext|>",
    dtype: Literal["float32", "bfloat16", "float16"] | None = None,
) -> None:
    """Write a folder for `AutoModelForCausalLM.from_pretrained` and `AutoTokenizer.from_pretrained`.

    It contains config.json, generation_config.json and model.safetensors, with a tokenizer also tokenizer.json and
    tokenizer_config.json, and checksums.json, by which our import finds damage (delete it after an edit). EOS tokens
    are `end_of_text` and what ends an answer of the chat template. The model is a Llama, or its relative with what a
    Llama lacks: a Mistral with a sliding window, a Qwen 2 with biases, a Qwen 3 with QK-norm. The folder appears when
    it is complete; after an error nothing is left.

    Args:
        model: pre-norm, RoPE and SwiGLU.
        directory: must not exist; its parent folder must.
        tokenizer: the tokenizer that the model was trained with.
        end_of_text: the special token between documents; it becomes the BOS and EOS token.
        dtype: of the weights in the file; None for the model's.

    Raises:
        InvalidInputError: a Llama cannot represent the model, or tokenizer.json the tokenizer; the message names the
            setting.
        WrongTokenizerError: the tokenizer has more ids than the model.
        FileExistsError: the folder exists.
    """
    output = Output(directory, "an export", is_folder=True)
    check_outputs([output])
    config = hf_config(model.config)
    end_id, ends = None, []
    if tokenizer is not None:
        check_tokenizer_size(tokenizer.vocab_size, model.config.vocab_size, _TOO_MANY_IDS)
        end_id = tokenizer.special_token_ids.get(end_of_text)
        ends = [tokenizer.special_token_ids.get(token or "") for token in (end_of_text, _end_of_answer(tokenizer))]
        ends = list(dict.fromkeys(token_id for token_id in ends if token_id is not None))
    ids = {"bos_token_id": end_id, "eos_token_id": end_id}
    saved_dtype = model.token_embeddings.weight.dtype if dtype is None else _DTYPES[dtype]
    weights = {
        hf_name(name, model.config.norm): to_hf_row_order(name, weight, model.config.d_head).to("cpu", saved_dtype)
        for name, weight in _weights(model)
    }
    with reserved_outputs([output]), atomic_folder(directory) as folder:
        write_json(
            folder / "config.json", {**config, **ids, "dtype": str(saved_dtype).removeprefix("torch.")}, indent=2
        )
        # Padding is masked, so any id serves; without one, transformers warns at every generation. The id is not in
        # config.json, because there it would exclude this id's embedding from training.
        eos = {"eos_token_id": ends if len(ends) > 1 else next(iter(ends), None)}
        write_json(folder / "generation_config.json", {**ids, **eos, "pad_token_id": end_id}, indent=2)
        save_safetensors(weights, folder / "model.safetensors", {"format": "pt"})
        if tokenizer is not None:
            save_tokenizer_json(tokenizer, folder / "tokenizer.json")
            settings = _tokenizer_config(model, None if end_id is None else end_of_text)
            if tokenizer.chat_template is not None:  # with the tokens that it names
                settings |= tokenizer.chat_template.tokens
                (folder / "chat_template.jinja").write_text(tokenizer.chat_template.source, encoding="utf-8")
            write_json(folder / "tokenizer_config.json", settings, indent=2)
        write_checksums(folder, sorted(path.name for path in folder.iterdir()))


def _end_of_answer(tokenizer: Tokenizer) -> str | None:
    """The special token with which the chat template ends an answer."""
    if tokenizer.chat_template is None:
        return None
    try:
        return ChatFormat(tokenizer).end_of_answer
    except InvalidInputError as error:
        warnings.warn(f"the export does not say at which token an answer ends: {error}", stacklevel=3)
        return None


def _tokenizer_config(model: TransformerLM, end_of_text: str | None) -> dict[str, Any]:
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": model.config.context_length,
        "bos_token": end_of_text,
        "eos_token": end_of_text,
        "clean_up_tokenization_spaces": False,
    }


def export_gguf(
    model: TransformerLM,
    path: str | os.PathLike,
    tokenizer: Tokenizer | None = None,
    *,
    end_of_text: str = "<|endoftext|>",
    matrix_type: Literal["F32", "F16", "BF16", "Q8_0"] = "F16",
) -> None:
    """Write a GGUF file, which llama.cpp and Ollama open. It appears when it is complete.

    Args:
        model: pre-norm, RoPE and SwiGLU.
        path: must not exist; its parent folder must.
        tokenizer: the tokenizer that the model was trained with. Without one, llama.cpp takes token ids only.
        end_of_text: as for `export_hf`.
        matrix_type: of the matrices; vectors are float32. F32 keeps float32 weights as they are. Q8_0 has 8 bits and a
            scale for each 32 numbers; a matrix with other rows is F16.

    Raises:
        InvalidInputError: llama.cpp cannot represent the model or the tokenizer (the message names the setting), or the
            package gguf is missing.
        WrongTokenizerError: the tokenizer has more ids than the model.
        FileExistsError: the file exists.
    """
    output = Output(path, "an export")
    check_outputs([output])
    config = model.config
    architecture, fields = gguf_fields(config)
    fields = {f"{architecture}.{name}": value for name, value in fields.items()}
    if tokenizer is not None:
        check_tokenizer_size(tokenizer.vocab_size, config.vocab_size, _TOO_MANY_IDS)
        fields |= gguf_tokenizer_fields(tokenizer, config.vocab_size, end_of_text, _end_of_answer(tokenizer))
    else:
        fields["tokenizer.ggml.model"] = "none"

    def tensors() -> Iterator[tuple[str, np.ndarray]]:
        for name, weight in _weights(model):
            if architecture != "llama":
                weight = to_hf_row_order(name, weight, config.d_head)
            yield gguf_name(name), weight.detach().float().cpu().numpy()
        if len(config.rope_scaling) == 4:
            yield ROPE_DIVISORS, rope_divisors(config.rope_theta, config.d_head, config.rope_scaling).numpy()

    if len(config.rope_scaling) == 4:
        fields[ROPE_SCALING] = list(config.rope_scaling)
    with reserved_outputs([output]), atomic_paths(path) as (temporary,), disk_errors():
        write_gguf(temporary, architecture, fields, tensors(), matrix_type)


def _weights(model: TransformerLM) -> Iterator[tuple[str, torch.Tensor]]:
    """The weights to write: a tied output matrix is not."""
    for name, weight in model.state_dict().items():
        if not (name == "lm_head.weight" and model.config.tied_embeddings):
            yield name, weight
