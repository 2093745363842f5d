"""Models in Hugging Face format, exported and imported, compared with transformers itself."""

import copy
import dataclasses
import json
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor

from basic.common.errors import DamagedFileError, InvalidInputError, WrongTokenizerError
from basic.formats.export_model import export_hf
from basic.formats.hf_names import model_config
from basic.formats.import_model import import_hf, import_pt, load_model
from basic.generation.continuation import generate
from basic.generation.text import complete
from basic.model import ModelConfig, TransformerLM
from basic.Tokenizer import Tokenizer
from basic.training.checkpoints.file import read_checkpoint, save_checkpoint
from basic.training.run_folder import load_run
from basic.training.settings import DataConfig, RunConfig, TrainConfig
from tests.conftest import SHARED_DATA, shared_data
from tests.helpers.checkpoint_tools import Bomb
from tests.helpers.model_tools import small_tokenizer, transformers, with_random_weights

END, OTHER = "<|endoftext|>", "<|endoftext|><|end|>"
CONTEXT = 16
SIZES: dict[str, Any] = {"context_length": CONTEXT, "d_model": 32, "num_layers": 2, "num_heads": 4, "d_ff": 24}
NOT_DEFAULT: dict[str, Any] = {"num_kv_heads": 2, "tied_embeddings": True, "rope_theta": 5e5, "norm_eps": 1e-2}
all_kinds = pytest.mark.parametrize(
    "changes", [{}, NOT_DEFAULT, {"num_kv_heads": 1}], ids=["defaults", "not defaults", "one KV head"]
)


def random_model(changes: dict[str, Any], vocab_size: int = 50) -> TransformerLM:
    return with_random_weights(TransformerLM(ModelConfig(vocab_size=vocab_size, **SIZES, **changes)).eval())


def same_weights(one: torch.nn.Module, other: torch.nn.Module) -> bool:
    """Whether two state dicts are equal bit for bit, dtypes included."""
    a, b = one.state_dict(), other.state_dict()
    return a.keys() == b.keys() and all(a[name].dtype == b[name].dtype and torch.equal(a[name], b[name]) for name in a)


@torch.no_grad()
def assert_same_behavior(ours: TransformerLM, theirs: Any) -> None:
    ids = torch.randint(ours.config.vocab_size, (3, CONTEXT))
    logits = theirs(ids).logits
    assert logits.std() > 0.5  # otherwise all logits would be close
    assert (ours(ids) - logits).abs().max() < 1e-4
    prompt, count = ids[:1, :4], CONTEXT - 4
    settings: dict[str, Any] = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    expected = theirs.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=count, **settings)
    assert generate(ours, prompt.tolist(), count, temperature=0.0) == expected[:, 4:].tolist()


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Tokenizer:
    """One special token is a prefix of the other, and has the id 0."""
    return small_tokenizer(tmp_path_factory.mktemp("bpe"), [END, OTHER])


def export_with_changes(folder: Path, model: TransformerLM, changes: dict[str, Any] | None = None) -> dict[str, Tensor]:
    """Export a model, change fields of config.json, and return the weights for further changes."""
    export_hf(model, folder)
    fields = json.loads((folder / "config.json").read_text()) | (changes or {})
    (folder / "config.json").write_text(json.dumps(fields))
    (folder / "checksums.json").unlink()  # the edits are accepted
    return safetensors.torch.load_file(folder / "model.safetensors")


# --- Import from transformers ---------------------------------------------------------------------------------


@all_kinds
@pytest.mark.parametrize("max_shard_size", ["1GB", "10KB"])
def test_llama_of_transformers_loads(changes, max_shard_size, tmp_path):
    torch.manual_seed(0)
    config = ModelConfig(vocab_size=50, **SIZES, **changes)
    theirs = (
        transformers()
        .LlamaForCausalLM(
            transformers().LlamaConfig(
                vocab_size=50,
                max_position_embeddings=CONTEXT,
                hidden_size=32,
                num_hidden_layers=2,
                num_attention_heads=4,
                num_key_value_heads=config.num_kv_heads,
                intermediate_size=24,
                rms_norm_eps=config.norm_eps,
                rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
                tie_word_embeddings=config.tied_embeddings,
                initializer_range=0.3,
            )
        )
        .eval()
    )
    theirs.save_pretrained(tmp_path, max_shard_size=max_shard_size)
    assert (tmp_path / "model.safetensors").exists() == (max_shard_size == "1GB")
    ours = load_model(tmp_path)
    assert ours.config == config
    assert ours.num_parameters == theirs.num_parameters()
    assert_same_behavior(ours, theirs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_converted_exactly(dtype, tmp_path):
    model = random_model({}).to(dtype)
    export_hf(model, tmp_path / "hf")
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["dtype"] == str(dtype).removeprefix("torch.")
    assert same_weights(load_model(tmp_path / "hf"), model.float())


def test_old_config_json_and_shorter_context(tmp_path):
    model = random_model({"rope_theta": 777.0})
    weights = export_with_changes(tmp_path / "hf", model)
    path = tmp_path / "hf" / "config.json"
    fields = json.loads(path.read_text())
    for name in ("rope_parameters", "head_dim", "num_key_value_heads", "tie_word_embeddings", "dtype", "mlp_bias"):
        del fields[name]
    fields |= {"partial_rotary_factor": None, "sliding_window": None, "is_llama_config": True}
    path.write_text(
        json.dumps({**fields, "torch_dtype": "float32", "pretraining_tp": 1, "transformers_version": "4.28"})
    )
    weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    safetensors.torch.save_file(weights, tmp_path / "hf" / "model.safetensors")
    loaded = load_model(tmp_path / "hf")
    assert loaded.config == model.config
    assert same_weights(loaded, model)

    short = load_model(tmp_path / "hf", context_length=5)
    assert short.config == dataclasses.replace(model.config, context_length=5)
    assert torch.equal(short(torch.tensor([[1, 2, 3]])), model(torch.tensor([[1, 2, 3]])))
    with pytest.raises(InvalidInputError, match="context_length must be 1 to 16 for this model, got 17"):
        load_model(tmp_path / "hf", context_length=17)


# --- Export and import ----------------------------------------------------------------------------------------


@all_kinds
def test_exported_model_opens_in_transformers_and_round_trips_bit_for_bit(changes, tokenizer, tmp_path):
    ours = random_model(changes, tokenizer.vocab_size + 3)
    export_hf(ours, tmp_path / "hf", tokenizer)
    loaded: Any = transformers().AutoModelForCausalLM.from_pretrained(tmp_path / "hf", output_loading_info=True)
    theirs, report = loaded
    assert not any(report.values())  # no missing, unexpected or mismatched tensors
    assert isinstance(theirs, transformers().LlamaForCausalLM)
    assert theirs.get_input_embeddings().padding_idx is None  # that embedding would not be trained
    assert theirs.generation_config.eos_token_id == theirs.config.eos_token_id == tokenizer.special_token_ids[END] == 0
    assert_same_behavior(ours, theirs)

    loaded_back = load_model(tmp_path / "hf")
    assert loaded_back.config == ours.config
    assert same_weights(loaded_back, ours)

    theirs.save_pretrained(tmp_path / "theirs")
    assert same_weights(load_model(tmp_path / "theirs"), ours)


def real_and_naughty_texts() -> list[str]:
    """The start of every text of the shared data, and a list of strings that often cause bugs."""
    shared_data("naughty_strings.json")
    texts = [path.read_bytes()[:20_000] for path in sorted(SHARED_DATA.glob("*")) if path.suffix != ".json"]
    naughty = json.loads((SHARED_DATA / "naughty_strings.json").read_text())
    return [text.decode(errors="replace") for text in texts] + naughty


def test_exported_tokenizer_gives_our_ids(tokenizer, tmp_path):
    export_hf(random_model({}, tokenizer.vocab_size), tmp_path / "hf", tokenizer)
    theirs: Any = transformers().AutoTokenizer.from_pretrained(tmp_path / "hf")
    assert (
        json.loads((tmp_path / "hf/tokenizer_config.json").read_text())["tokenizer_class"] == "PreTrainedTokenizerFast"
    )
    assert (theirs.eos_token, theirs.eos_token_id, theirs.model_max_length) == (END, 0, CONTEXT)
    specials = f"{END}{OTHER}{END} {OTHER}<|end|>{END}\n"
    for text in ["", "the cat", specials, f"{specials}the dog's  café{specials}"]:
        ids = tokenizer.encode(text)
        assert theirs(text)["input_ids"] == ids
        assert theirs.decode(ids) == text


def test_exported_tokenizer_gives_our_ids_on_real_and_naughty_texts(tokenizer, tmp_path):
    texts = real_and_naughty_texts()
    assert len(texts) > 500
    export_hf(random_model({}, tokenizer.vocab_size), tmp_path / "hf", tokenizer)
    theirs: Any = transformers().AutoTokenizer.from_pretrained(tmp_path / "hf")
    for text, ids in zip(texts, theirs(texts)["input_ids"], strict=True):
        assert ids == tokenizer.encode(text)
    with_specials = [OTHER.join(texts[i : i + 50]) for i in range(0, len(texts), 50)]
    assert theirs(with_specials)["input_ids"] == list(map(tokenizer.encode, with_specials))


def test_export_to_a_full_disk_is_an_error_of_the_system_and_leaves_nothing(tmp_path, monkeypatch):
    def fail(*arguments):
        raise safetensors.SafetensorError("Error while serializing: I/O error: File too large (os error 27)")

    monkeypatch.setattr(safetensors.torch, "save_file", fail)
    with pytest.raises(OSError, match="while weights were written"):
        export_hf(random_model({}), tmp_path / "exported")
    assert not list(tmp_path.iterdir())


def test_export_leaves_nothing_after_an_error_and_does_not_overwrite(tokenizer, tmp_path):
    model = random_model({}, tokenizer.vocab_size)
    with pytest.raises(InvalidInputError, match="the vocabulary"):  # found after the weights are written
        export_hf(model, tmp_path / "hf", Tokenizer({0: b"a"}, []))
    assert list(tmp_path.iterdir()) == []
    export_hf(model, tmp_path / "hf", tokenizer)
    assert list(tmp_path.iterdir()) == [tmp_path / "hf"]
    modes = {path.name: path.stat().st_mode for path in (tmp_path / "hf").iterdir()}
    assert len(modes) == 6
    assert len(set(modes.values())) == 1  # the weights have the same permissions as the other files
    with pytest.raises(FileExistsError, match="already exists; choose another name"):
        export_hf(model, tmp_path / "hf", tokenizer)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"norm": "post"}, "norm='post'"),
        ({"norm": "none", "ffn": "silu"}, "norm='none' and ffn='silu'"),
        ({"positions": "none"}, "positions='none'"),
    ],
)
def test_model_that_is_not_a_llama_is_an_error(changes, named, tmp_path):
    with pytest.raises(
        InvalidInputError, match=f"cannot express {named}; only models with norm='pre'.*--recipe handout"
    ):
        export_hf(random_model(changes), tmp_path / "hf")
    assert list(tmp_path.iterdir()) == []


def test_tokenizer_with_more_ids_than_the_model_is_an_error(tokenizer, tmp_path):
    size = tokenizer.vocab_size
    message = f"the tokenizer's {size} ids do not fit into the model's vocab_size={size - 1}"
    with pytest.raises(WrongTokenizerError, match=message):
        export_hf(random_model({}, size - 1), tmp_path / "hf", tokenizer)
    assert list(tmp_path.iterdir()) == []
    export_hf(random_model({}, size), tmp_path / "hf", tokenizer)
    export_hf(random_model({}, size - 1), tmp_path / "small")
    shutil.copy(tmp_path / "hf" / "tokenizer.json", tmp_path / "small")
    with pytest.raises(WrongTokenizerError, match=message):
        import_hf(tmp_path / "small", tmp_path / "run")
    (tmp_path / "small" / "tokenizer.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"no tokenizer\.json; .* without a tokenizer \(--no-tokenizer\)"):
        import_hf(tmp_path / "small", tmp_path / "run")
    import_hf(tmp_path / "small", tmp_path / "run", with_tokenizer=False)
    assert load_run(tmp_path / "run", device="cpu").tokenizer_path is None


# --- Unsupported and damaged files ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("model_type", "gpt2", "model_type is 'gpt2'; only 'llama', 'mistral', 'qwen2', 'qwen3', 'olmo2' can be read"),
        ("model_type", None, "model_type is None"),
        ("hidden_act", "gelu", "hidden_act is 'gelu'; only 'silu'"),
        ("attention_bias", True, "attention_bias is True"),
        ("mlp_bias", True, "mlp_bias is True"),
        ("sliding_window", 4096, "sliding_window is 4096; a 'llama' has none"),
        ("quantization_config", {"bits": 4}, r"quantization_config is \{'bits': 4\}"),
        ("partial_rotary_factor", 0.5, "partial_rotary_factor is 0.5"),
        ("head_dim", "8", "head_dim must be an integer, got str: '8'"),
        ("head_dim", 7, ".*head_dim must be even, got 7"),
        ("rope_scaling", {"type": "linear"}, "rope_scaling is .*'linear'.*, which lacks factor"),
        ("rope_scaling", {"type": "linear", "factor": "2"}, r"rope_scaling\[0\] must be a number, got str: '2'"),
        ("rope_scaling", {"rope_type": "llama3", "factor": 8.0}, "rope_scaling is .*, which lacks low_freq_factor, "),
        ("rope_scaling", {"type": "dynamic", "factor": 2.0}, "rope_scaling is .*; only the rope_type 'default', "),
        ("rope_parameters", {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}, "rope_parameters is .*'yarn'"),
        ("rope_parameters", {"rope_type": "yarn", "factor": 1.0, "mscale": 2.0}, ".*with 'yarn' only .'factor', "),
        ("rope_parameters", {"rope_type": "default", "partial_rotary_factor": 0.5}, "rope_parameters is .*0.5"),
        ("rope_parameters", "default", "rope_parameters is 'default'"),
        ("hidden_size", "32", r"d_model must be an integer, got str: '32' \(.*hidden_size is our d_model"),
        ("num_key_value_heads", 3, "num_kv_heads=3 must be at least 1 and divide num_heads=4"),
        ("tie_word_embeddings", 1, "tied_embeddings must be true or false, got int: 1"),
    ],
)
def test_unsupported_field_is_an_error_that_names_it(name, value, message, tmp_path):
    export_with_changes(tmp_path / "hf", random_model({}), {name: value})
    with pytest.raises(InvalidInputError, match=r"config\.json: " + message):
        load_model(tmp_path / "hf")


def test_missing_field_and_damaged_config_json(tmp_path):
    with pytest.raises(InvalidInputError, match="the field 'hidden_size' is missing"):
        model_config({"model_type": "llama", "vocab_size": 3, "max_position_embeddings": 3})
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        load_model(tmp_path)
    for content, message in (("{", "is not JSON"), ("[]", r"must hold a JSON object, got \[\]")):
        (tmp_path / "config.json").write_text(content)
        with pytest.raises(DamagedFileError, match=message):
            load_model(tmp_path)


Q = "model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: {**w, f"{Q}.bias": torch.ones(32)}, f"has '{Q}.bias', of shape .32,., which is not a weight"),
        (lambda w: {**w, "score.weight": torch.ones(2, 32)}, "has 'score.weight'"),
        (lambda w: w.pop("model.norm.weight") is None or w, "the weights lack 'model.norm.weight'"),
        (lambda w: {**w, f"{Q}.weight": torch.ones(16, 32)}, r"of shape \(16, 32\); this model takes \(32, 32\)"),
        (lambda w: {**w, f"{Q}.weight": torch.ones(32, 32).to(torch.int8)}, f"'{Q}.weight' as torch.int8"),
        (lambda w: {**w, f"{Q}.weight": torch.ones(32, 32).double()}, f"'{Q}.weight' as torch.float64"),
    ],
    ids=["bias", "another head", "missing", "shape", "int8", "float64"],
)
def test_weight_that_does_not_match_is_an_error_that_names_it(change, message, tmp_path):
    weights = export_with_changes(tmp_path / "hf", random_model({}))
    safetensors.torch.save_file(change(weights), tmp_path / "hf" / "model.safetensors")
    with pytest.raises(InvalidInputError, match=message):
        load_model(tmp_path / "hf")


def test_output_matrix_of_a_tied_model_must_equal_the_embedding(tmp_path):
    model = random_model(NOT_DEFAULT)
    weights = export_with_changes(tmp_path / "hf", model)
    assert "lm_head.weight" not in weights
    for change in (0.0, 1e-6):
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"] + change
        safetensors.torch.save_file(weights, tmp_path / "hf" / "model.safetensors")
        if change == 0:
            assert same_weights(load_model(tmp_path / "hf"), model)
    with pytest.raises(InvalidInputError, match=r"tied by the configuration, but differ from lm_head\.weight"):
        load_model(tmp_path / "hf")


def test_a_flipped_bit_in_any_exported_file_is_found_and_an_edit_can_be_accepted(tmp_path, tokenizer):
    hf = tmp_path / "hf"
    model = random_model({}, 300)
    export_hf(model, hf, tokenizer)
    names = sorted(path.name for path in hf.iterdir())
    assert len(names) == 6
    for path in (hf / name for name in names):
        content = path.read_bytes()
        position = len(content) * 2 // 3
        path.write_bytes(content[:position] + bytes([content[position] ^ 1]) + content[position + 1 :])
        with pytest.raises(DamagedFileError, match=rf"delete .*checksums\.json|{path.name}"):
            import_hf(hf, tmp_path / "run")
        path.write_bytes(content)
    fields = json.loads((hf / "config.json").read_text())
    (hf / "config.json").write_text(json.dumps(fields))
    with pytest.raises(DamagedFileError, match=r"config\.json has changed .* on purpose, delete .*checksums\.json"):
        load_model(hf)
    (hf / "checksums.json").unlink()
    assert same_weights(load_model(hf), model)


def test_damaged_and_missing_files_are_errors(tmp_path):
    hf, model = tmp_path / "hf", random_model({})
    weights = export_with_changes(hf, model)
    content = (hf / "model.safetensors").read_bytes()
    (hf / "model.safetensors").write_bytes(content[: len(content) // 2])
    with pytest.raises(DamagedFileError, match=r"model\.safetensors is not a complete safetensors file"):
        load_model(hf)
    (hf / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"neither model\.safetensors nor model\.safetensors\.index\.json$"):
        load_model(hf)
    index = hf / "model.safetensors.index.json"
    for wrong in ({}, {"weight_map": []}, {"weight_map": None}, {"weight_map": {"a": 3}}, {"weight_map": {"a": [1]}}):
        index.write_text(json.dumps(wrong))
        with pytest.raises(DamagedFileError, match=r"index\.json must hold the name of a file for each weight"):
            load_model(hf)
    index.write_text(json.dumps({"weight_map": dict.fromkeys(weights, "shard.safetensors")}))
    with pytest.raises(FileNotFoundError, match=r"no .*shard\.safetensors, which the index names"):
        load_model(hf)
    (hf / "shard.safetensors").write_bytes(content)
    assert same_weights(load_model(hf), model)
    index.write_text(json.dumps({"weight_map": {name: f"{i % 2}.safetensors" for i, name in enumerate(weights)}}))
    for shard in ("0.safetensors", "1.safetensors"):
        (hf / shard).write_bytes(content)
    with pytest.raises(InvalidInputError, match=r"1\.safetensors has '.*', of shape .*, a second time"):
        load_model(hf)
    (tmp_path / "outside.safetensors").write_bytes(content)
    index.write_text(json.dumps({"weight_map": dict.fromkeys(weights, "../outside.safetensors")}))
    with pytest.raises(InvalidInputError, match=r"names '\.\./outside\.safetensors', which is not a file beside it"):
        load_model(hf)


# --- Runs -----------------------------------------------------------------------------------------------------


def test_imported_model_is_a_run(tokenizer, tmp_path):
    model = random_model({"num_kv_heads": 2}, tokenizer.vocab_size)
    export_hf(model, tmp_path / "hf", tokenizer, end_of_text=OTHER)
    import_hf(tmp_path / "hf", tmp_path / "run")
    run = load_run(tmp_path / "run", device="cpu")
    assert (run.step, run.config.model, run.config.train.end_of_text) == (0, model.config, OTHER)
    assert same_weights(run.model, model)
    assert run.tokenizer_path is not None
    loaded = Tokenizer.load(run.tokenizer_path)
    assert loaded.fingerprint == tokenizer.fingerprint
    assert complete(run.model, loaded, ["the"], 5, seed=1) == complete(model, tokenizer, ["the"], 5, seed=1)
    with pytest.raises(FileExistsError):
        import_hf(tmp_path / "hf", tmp_path / "run")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf", "run"]


def test_end_of_text_has_its_default_without_an_eos_token(tokenizer, tmp_path):
    plain = Tokenizer(tokenizer.vocab, tokenizer.merges)
    export_hf(random_model({}, 300), tmp_path / "hf", plain)
    import_hf(tmp_path / "hf", tmp_path / "run")
    assert load_run(tmp_path / "run", device="cpu").config.train.end_of_text == END


# --- Pickles --------------------------------------------------------------------------------------------------


def test_pickle_is_read_only_on_request_and_never_runs_code(tmp_path):
    hf, model = tmp_path / "hf", random_model({})
    weights = export_with_changes(hf, model)
    (hf / "model.safetensors").unlink()
    torch.save(weights, hf / "pytorch_model.bin")
    with pytest.raises(FileNotFoundError, match=r"it has weights as a pickle .* only when unpickle is asked for"):
        load_model(hf)
    assert same_weights(load_model(hf, unpickle=True), model)

    torch.save({**weights, "bomb": Bomb(tmp_path / "crater")}, hf / "pytorch_model.bin")
    with pytest.raises(DamagedFileError, match=r"pytorch_model\.bin is damaged, or holds more than tensors"):
        load_model(hf, unpickle=True)
    (hf / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb(tmp_path / "crater"), protocol=2))
    with pytest.raises(DamagedFileError, match="holds more than tensors"):
        load_model(hf, unpickle=True)
    assert not (tmp_path / "crater").exists()
    torch.save([1, 2], hf / "pytorch_model.bin")
    with pytest.raises(DamagedFileError, match="must hold a dictionary from names to tensors"):
        load_model(hf, unpickle=True)


def test_a_run_whose_checkpoint_has_names_of_wrappers_is_loaded(tokenizer, tmp_path):
    model = random_model({}, tokenizer.vocab_size)
    export_hf(model, tmp_path / "hf", tokenizer)
    import_hf(tmp_path / "hf", tmp_path / "run")
    weights = copy.deepcopy(model)
    weights.layers[1] = torch.nn.ModuleDict({"_orig_mod": torch.nn.ModuleDict({"module": weights.layers[1]})})
    checkpoint = tmp_path / "run" / "checkpoints" / "step_00000000.safetensors"
    save_checkpoint(torch.nn.ModuleDict({"module": weights}), None, 0, checkpoint)
    assert "module.layers.1._orig_mod.module.ln1.weight" in dict(read_checkpoint(checkpoint).entry("model"))
    assert same_weights(load_run(tmp_path / "run", device="cpu").model, model)


@pytest.mark.parametrize("wrapped", ["alone", "in a checkpoint", "compiled", "sharded"])
def test_state_dict_with_our_names_becomes_a_run(wrapped, tokenizer, tmp_path):
    model = random_model({"norm": "post", "tied_embeddings": True}, 300)
    state: dict[str, Any] = dict(model.state_dict())
    if wrapped == "compiled":
        state = {f"_orig_mod.module.{name.replace('s.1.', 's.1._orig_mod.')}": state[name] for name in state}
        assert "_orig_mod.module.layers.1._orig_mod.ln1.weight" in state
    if wrapped == "sharded":
        state = {
            name.replace("s.1.", "s.1._fsdp_wrapped_module._checkpoint_wrapped_module."): state[name] for name in state
        }
    content = {"iteration": 7, "optimizer": {"state": {}}, "model": state} if wrapped != "alone" else state
    torch.save(content, tmp_path / "model.pt")
    tokenizer.save(tmp_path / "tokenizer")
    data = DataConfig(tokenizer=str(tmp_path / "tokenizer"))
    config = RunConfig(model=model.config, train=TrainConfig(steps=9), data=data)
    import_pt(tmp_path / "model.pt", tmp_path / "run", config)
    run = load_run(tmp_path / "run", device="cpu")
    assert run.config == config
    assert same_weights(run.model, model)
    assert run.tokenizer_path is not None

    other = dataclasses.replace(config, model=dataclasses.replace(model.config, num_layers=1))
    with pytest.raises(InvalidInputError, match=r"'layers\.1\.ln1\.weight', of shape .*, which is not a weight"):
        import_pt(tmp_path / "model.pt", tmp_path / "other", other)
    torch.save({"weights": [1, 2]}, tmp_path / "model.pt")
    with pytest.raises(InvalidInputError, match=r"holds no state dict with a token_embeddings\.weight"):
        import_pt(tmp_path / "model.pt", tmp_path / "other", config)
    assert not (tmp_path / "other").exists()
