"""Export a model in Hugging Face format: a folder that transformers opens as a Llama, with its tokenizer."""

from __future__ import annotations

import os
from typing import Any

import safetensors.torch

from basic.common.files import atomic_folder, write_json
from basic.common.outputs import Output, check_outputs, reserved_outputs
from basic.formats.llama_names import hf_config, hf_name, to_hf_row_order
from basic.formats.tokenizer_json import save_tokenizer_json
from basic.model import TransformerLM
from basic.Tokenizer import Tokenizer
from basic.training.batches import check_tokenizer_size
from basic.training.checkpoints.file import disk_errors


def export_hf(
    model: TransformerLM,
    directory: str | os.PathLike,
    tokenizer: Tokenizer | None = None,
    *,
    end_of_text: str = "<|endoftext|>",
) -> None:
    """Write a folder for `AutoModelForCausalLM.from_pretrained` and `AutoTokenizer.from_pretrained`.

    It contains config.json, generation_config.json and model.safetensors, and with a tokenizer tokenizer.json and
    tokenizer_config.json. The folder appears when it is complete; after an error nothing is left.

    Args:
        model: pre-norm, RoPE and SwiGLU; the weights keep their dtype.
        directory: must not exist; its parent folder must.
        tokenizer: the tokenizer that the model was trained with.
        end_of_text: the special token between documents; it becomes the BOS and EOS token.

    Raises:
        InvalidInputError: a Llama cannot represent the model, or tokenizer.json the tokenizer; the message names the
            setting.
        WrongTokenizerError: the tokenizer has more ids than the model.
        FileExistsError: the folder exists.
    """
    output = Output(directory, "an export", is_folder=True)
    check_outputs([output])
    config = hf_config(model.config)
    end_id = None
    if tokenizer is not None:
        remedy = "export the model with the tokenizer it was trained with"
        check_tokenizer_size(tokenizer.vocab_size, model.config.vocab_size, remedy)
        end_id = tokenizer.special_token_ids.get(end_of_text)
    ids = {"bos_token_id": end_id, "eos_token_id": end_id}
    weights = {
        hf_name(name): to_hf_row_order(name, weight, model.config.d_head).cpu()
        for name, weight in model.state_dict().items()
        if not (name == "lm_head.weight" and model.config.tied_embeddings)
    }
    dtype = str(model.token_embeddings.weight.dtype).removeprefix("torch.")
    with reserved_outputs([output]), atomic_folder(directory) as folder:
        write_json(folder / "config.json", {**config, **ids, "dtype": dtype}, indent=2)
        # Padding is masked, so any id serves; without one, transformers warns at every generation. The id is not in
        # config.json, because there it would exclude this id's embedding from training.
        write_json(folder / "generation_config.json", {**ids, "pad_token_id": end_id}, indent=2)
        (folder / "model.safetensors").touch()
        mode = (folder / "model.safetensors").stat().st_mode  # safetensors creates files that only the owner can read
        with disk_errors():
            safetensors.torch.save_file(weights, folder / "model.safetensors", {"format": "pt"})
        (folder / "model.safetensors").chmod(mode)
        if tokenizer is not None:
            save_tokenizer_json(tokenizer, folder / "tokenizer.json")
            settings = _tokenizer_config(model, None if end_id is None else end_of_text)
            write_json(folder / "tokenizer_config.json", settings, indent=2)


def _tokenizer_config(model: TransformerLM, end_of_text: str | None) -> dict[str, Any]:
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": model.config.context_length,
        "bos_token": end_of_text,
        "eos_token": end_of_text,
        "clean_up_tokenization_spaces": False,
    }
