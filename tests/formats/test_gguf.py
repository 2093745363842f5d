"""GGUF: round trips, the writer of the `gguf` package as an independent program, transformers as a reader."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from basic.common.errors import DamagedFileError, InvalidInputError
from basic.formats.export_model import export_gguf
from basic.formats.gguf_file import GGUFFile, load_gguf_package
from basic.formats.gguf_tokenizer import gguf_tokenizer_fields, read_gguf_tokenizer
from basic.formats.import_model import import_run, load_model
from basic.generation.continuation import generate
from basic.model import ModelConfig, TransformerLM
from basic.Tokenizer import Tokenizer
from basic.tokenizer_files.content import TokenizerSettings
from basic.training.run_folder import load_run
from tests.helpers.model_tools import small_tokenizer, with_random_weights
from tests.helpers.tokenizer_tools import BYTES

gguf = pytest.importorskip("gguf", reason="the formats extra is not installed")

END = "<|endoftext|>"
SIZES: dict[str, Any] = {"context_length": 64, "d_model": 64, "num_layers": 2, "num_heads": 4, "d_ff": 96}
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": {"num_kv_heads": 2, "rope_theta": 5e5, "norm_eps": 1e-6},
    "tied": {"tied_embeddings": True, "head_dim": 24},
    "linear": {"rope_scaling": (2.3,)},
    "llama3": {"rope_scaling": (8.0, 1.1, 4.3, 16.0), "head_dim": 32},
    "qwen2": {"qkv_bias": True, "num_kv_heads": 1},
    "qwen3": {"qk_norm": True, "head_dim": 32, "tied_embeddings": True},
}


def random_model(changes: dict[str, Any], vocab_size: int = 320) -> TransformerLM:
    return with_random_weights(TransformerLM(ModelConfig(vocab_size=vocab_size, **SIZES, **changes)).eval())


def rounded(model: TransformerLM, kind: str) -> dict[str, torch.Tensor]:
    """The weights as a file of this kind has them: matrices rounded by torch, or by the `gguf` package."""

    def round_matrix(weight: torch.Tensor) -> torch.Tensor:
        if kind == "Q8_0":
            q8 = gguf.GGMLQuantizationType.Q8_0
            return torch.from_numpy(gguf.quants.dequantize(gguf.quants.quantize(weight.numpy(), q8), q8))
        return weight.to({"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}[kind]).float()

    return {name: round_matrix(w) if w.ndim > 1 else w for name, w in model.state_dict().items()}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Tokenizer:
    return small_tokenizer(tmp_path_factory.mktemp("bpe"), [END, "<|other|>"])


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(InvalidInputError, match=r"need the package gguf; use `pip install gguf`, or in a clone"):
        load_gguf_package()


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q8_0"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_ours_to_gguf_to_ours(name: str, kind: Any, tmp_path: Path) -> None:
    model = random_model(ARCHITECTURES[name])
    export_gguf(model, tmp_path / "model.gguf", matrix_type=kind)
    loaded = load_model(tmp_path / "model.gguf")
    assert loaded.config == model.config
    expected = rounded(model, kind)
    assert expected.keys() == loaded.state_dict().keys()
    assert all(torch.equal(weight, expected[name]) for name, weight in loaded.state_dict().items())


def test_rows_that_do_not_fit_into_blocks_are_f16(tmp_path: Path) -> None:
    torch.manual_seed(0)
    sizes: dict[str, Any] = SIZES | {"d_model": 24, "d_ff": 32}
    model = TransformerLM(ModelConfig(vocab_size=9, **sizes))
    export_gguf(model, tmp_path / "model.gguf", matrix_type="Q8_0")
    loaded = load_model(tmp_path / "model.gguf").state_dict()
    halves = {name: weight.half().float() for name, weight in model.state_dict().items()}
    assert torch.equal(loaded["layers.0.ffn.w1.weight"], halves["layers.0.ffn.w1.weight"])
    assert not torch.equal(loaded["layers.0.ffn.w2.weight"], halves["layers.0.ffn.w2.weight"])


@pytest.mark.parametrize("name", ["llama", "tied", "qwen2", "qwen3"])
def test_transformers_reads_the_file_to_the_same_logits(name: str, tokenizer: Tokenizer, tmp_path: Path) -> None:
    pytest.importorskip("accelerate", reason="transformers needs accelerate to read GGUF")
    from transformers import AutoModelForCausalLM

    # transformers 5 does not read the size of a head: it has that of its class.
    model = random_model(ARCHITECTURES[name] | {"head_dim": 128 if name == "qwen3" else None})
    export_gguf(model, tmp_path / "model.gguf", tokenizer, matrix_type="F32")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="model.gguf", dtype=torch.float32).eval()
    ids = torch.randint(320, (1, 64))
    with torch.no_grad():
        assert (theirs(ids).logits - model(ids)).abs().max() < 1e-4


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_llama_cpp_gives_the_same_ids_logits_and_text(name: str, tokenizer: Tokenizer, tmp_path: Path) -> None:
    llama_cpp = pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
    model = random_model(ARCHITECTURES[name])
    export_gguf(model, tmp_path / "model.gguf", tokenizer, matrix_type="F32")
    options: dict[str, Any] = {"n_ctx": 64, "logits_all": True, "n_threads": 1, "verbose": False}
    options |= {"type_k": llama_cpp.GGML_TYPE_F32, "type_v": llama_cpp.GGML_TYPE_F32}
    llama = llama_cpp.Llama(str(tmp_path / "model.gguf"), **options)
    text = f"the dog's café{END}12 cats"
    ids = tokenizer.encode(text)
    assert llama.tokenize(text.encode(), add_bos=False, special=True) == ids
    llama.eval(ids)
    with torch.no_grad():
        expected = model(torch.tensor([ids]))[0]
    assert expected.std() > 0.5
    assert (torch.from_numpy(llama.scores[: len(ids)]) - expected).abs().max() < 1e-3
    llama.reset()
    found = []
    for token in llama.generate(ids, temp=0.0, repeat_penalty=1.0):
        found.append(token)
        if len(found) == 20:
            break
    assert generate(model, [ids], 20, temperature=0) == [found]


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q8_0", "BF16"])
def test_a_file_of_the_gguf_package_is_dequantized_by_it(kind: str, tmp_path: Path) -> None:
    """Written with nothing of ours; the fields are those of a Llama 3.2, whose scaling is a tensor."""
    torch.manual_seed(0)
    quantization = gguf.GGMLQuantizationType[kind]
    writer = gguf.GGUFWriter(tmp_path / "a.gguf", "llama")
    writer.add_context_length(131_072)
    writer.add_embedding_length(64)
    writer.add_block_count(1)
    writer.add_feed_forward_length(32)
    writer.add_head_count(2)
    writer.add_head_count_kv(1)
    writer.add_rope_freq_base(500_000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    shapes = {"attn_q": (64, 64), "attn_k": (32, 64), "attn_v": (32, 64), "attn_output": (64, 64)}
    shapes |= {"ffn_gate": (32, 64), "ffn_up": (32, 64), "ffn_down": (64, 32)}
    matrices = {"token_embd.weight": (50, 64)} | {f"blk.0.{name}.weight": shape for name, shape in shapes.items()}
    values = {name: np.random.default_rng(1).normal(size=shape).astype("f") for name, shape in matrices.items()}
    for name, value in values.items():
        writer.add_tensor(name, gguf.quants.quantize(value, quantization), raw_dtype=quantization)
    for name in ("blk.0.attn_norm.weight", "blk.0.ffn_norm.weight", "output_norm.weight"):
        writer.add_tensor(name, np.ones(64, "f"))
    # As convert_hf_to_gguf.py has it for factor 32, low 1, high 4, context 8192.
    frequencies = 1.0 / (500_000.0 ** (np.arange(0, 32, 2) / 32))
    wavelengths = 2 * np.pi / frequencies
    smooth = (8192 / wavelengths - 1) / 3
    divisors = np.where(wavelengths < 2048, 1, np.where(wavelengths > 8192, 32, 1 / ((1 - smooth) / 32 + smooth)))
    writer.add_tensor("rope_freqs.weight", divisors.astype("f"))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    model = load_model(tmp_path / "a.gguf", context_length=100)
    assert model.config == ModelConfig(
        vocab_size=50, context_length=100, d_model=64, num_layers=1, num_heads=2, num_kv_heads=1, d_ff=32,
        rope_theta=5e5, rope_scaling=(32.0, 1.0, 4.0, 8192.0), tied_embeddings=True,
    )  # fmt: skip
    w1 = values["blk.0.ffn_gate.weight"]
    expected = gguf.quants.dequantize(gguf.quants.quantize(w1, quantization), quantization)
    assert torch.equal(model.state_dict()["layers.0.ffn.w1.weight"], torch.from_numpy(expected))


# --- Tokenizer ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pattern", ["gpt2", "llama3", "qwen2", "starcoder", "o200k", "deepseek"])
def test_tokenizer_round_trip(pattern: str, tokenizer: Tokenizer, tmp_path: Path) -> None:
    ours = Tokenizer(tokenizer.vocab, tokenizer.merges, tokenizer.special_token_ids, pattern=pattern)
    export_gguf(random_model({}, 310), tmp_path / "model.gguf", ours, end_of_text=END)
    file = GGUFFile(tmp_path / "model.gguf")
    assert len(file.fields["tokenizer.ggml.tokens"]) == 310
    loaded = read_gguf_tokenizer(file.fields)
    assert loaded.special_token_ids == ours.special_token_ids
    for text in (f"the dog's café{END}12345 cats\r\n\n", "nobody<|other|>  sees 日本 X9"):
        assert loaded.encode(text) == ours.encode(text)
        assert loaded.decode(loaded.encode(text)) == text
    import_run(tmp_path / "model.gguf", tmp_path / "run")
    assert load_run(tmp_path / "run", device="cpu").config.train.end_of_text == END


def test_options_of_a_tokenizer_round_trip(tokenizer: Tokenizer) -> None:
    """A BOS token, a token that is not left out where special ones are, and merges that are ignored."""
    bos = tokenizer.special_token_ids[END]
    single = [{"SpecialToken": {"id": END, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    special = {END: {"id": END, "ids": [bos], "tokens": [END]}}
    settings = TokenizerSettings(
        ignore_merges=True,
        flags={"<|other|>": {"special": False}},
        post_processor={"type": "TemplateProcessing", "single": single, "pair": single, "special_tokens": special},
    )
    ours = Tokenizer(
        tokenizer.vocab, tokenizer.merges, tokenizer.special_token_ids, pattern="llama3", settings=settings
    )
    fields = gguf_tokenizer_fields(ours, ours.vocab_size, END)
    assert (fields["tokenizer.ggml.pre"], fields["tokenizer.ggml.add_bos_token"]) == ("llama-bpe", True)
    loaded = read_gguf_tokenizer(fields)
    assert loaded.settings.ignore_merges
    assert loaded.encode("the cat", template=True) == [bos, *ours.encode("the cat")]
    assert loaded.settings.flags == settings.flags


def test_a_vocabulary_that_lacks_bytes_goes_both_ways(tokenizer: Tokenizer) -> None:
    """SmolLM2's lacks eight. A tokenizer of our own that lacks one is refused."""
    vocab = {i: token for i, token in tokenizer.vocab.items() if token != b"\x04"}
    fields = gguf_tokenizer_fields(tokenizer, tokenizer.vocab_size, END)
    fields["tokenizer.ggml.token_type"][tokenizer.token_to_id(b"\x04")] = 5
    loaded = read_gguf_tokenizer(fields)
    assert loaded.vocab == vocab
    assert read_gguf_tokenizer(gguf_tokenizer_fields(loaded, loaded.vocab_size, END)).vocab == vocab
    with pytest.raises(InvalidInputError, match="lacks a token for the byte 0x04"):
        gguf_tokenizer_fields(Tokenizer(vocab, tokenizer.merges), tokenizer.vocab_size, END)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokenizer.ggml.model": "llama"}, "tokenizer.ggml.model is 'llama'; only 'gpt2'"),
        ({"tokenizer.ggml.pre": "default"}, "tokenizer.ggml.pre is 'default'; only gpt-2"),
    ],
)
def test_unsupported_tokenizer(changes: dict[str, Any], message: str, tokenizer: Tokenizer) -> None:
    fields = gguf_tokenizer_fields(tokenizer, tokenizer.vocab_size, END)
    with pytest.raises(InvalidInputError, match=message):
        read_gguf_tokenizer(fields | changes)
    with pytest.raises(DamagedFileError, match="not complete"):
        read_gguf_tokenizer({name: value for name, value in fields.items() if name != "tokenizer.ggml.merges"})


def test_a_pattern_that_llama_cpp_lacks_is_refused(tokenizer: Tokenizer, tmp_path: Path) -> None:
    ours = Tokenizer(tokenizer.vocab, tokenizer.merges, tokenizer.special_token_ids, pattern=r"\w+|\W+")
    with pytest.raises(InvalidInputError, match="no pre-tokenizer that splits a text as this tokenizer's pattern"):
        export_gguf(random_model({}), tmp_path / "model.gguf", ours)
    assert not list(tmp_path.iterdir())


# --- Refusals -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sliding_window": 7}, "no sliding window for a Llama-like model, got sliding_window=7"),
        ({"norm": "post"}, "a Llama of llama.cpp cannot express norm='post'"),
        ({"norm": "sublayer", "qk_norm": "all_heads"}, "a Llama of llama.cpp cannot express norm='sublayer'"),
    ],
)
def test_a_model_that_llama_cpp_lacks_is_refused(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(InvalidInputError, match=message):
        export_gguf(random_model(changes), tmp_path / "model.gguf")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"general.architecture": "gemma"}, "general.architecture is 'gemma'; only 'llama', 'qwen2', 'qwen3'"),
        ({"llama.expert_count": 8}, "llama.expert_count is 8"),
        ({"llama.attention.value_length": 8}, "llama.attention.value_length is 8; only the head size 16"),
        ({"llama.rope.scaling.type": "yarn", "llama.rope.scaling.factor": 4.0}, "llama.rope.scaling.type is 'yarn'"),
        ({"llama.block_count": None}, "the field 'llama.block_count' is missing"),
        ({"llama.block_count": [1, 2]}, r"llama.block_count is \[1, 2\]; only an integer"),
        ({"llama.block_count": 3}, "the weights lack 'blk.2.attn_norm.weight'"),
        ({"basic.rope_scaling": [3.0, 1.0, 4.0, 64.0]}, "rope_freqs.weight has divisors up to 8"),
    ],
    ids=str,
)
def test_unsupported_fields(changes: dict[str, Any], message: str, tmp_path: Path, monkeypatch) -> None:
    export_gguf(random_model({"rope_scaling": (8.0, 1.0, 4.0, 64.0)}), tmp_path / "model.gguf")
    read = GGUFFile.__init__

    def changed(self: GGUFFile, path: Path) -> None:
        read(self, path)
        self.fields = {name: value for name, value in (self.fields | changes).items() if value is not None}

    monkeypatch.setattr(GGUFFile, "__init__", changed)
    with pytest.raises(InvalidInputError, match=message):
        load_model(tmp_path / "model.gguf")


def test_a_damaged_file(tmp_path: Path) -> None:
    export_gguf(random_model({}), tmp_path / "model.gguf")
    content = (tmp_path / "model.gguf").read_bytes()
    for length in (5, 100, len(content) // 2):
        (tmp_path / "cut.gguf").write_bytes(content[:length])
        with pytest.raises(DamagedFileError, match="not a complete GGUF file"):
            load_model(tmp_path / "cut.gguf")


def test_a_tokenizer_without_merges_is_refused() -> None:
    with pytest.raises(InvalidInputError, match="needs merges, but this tokenizer has none; export"):
        gguf_tokenizer_fields(Tokenizer(BYTES, [], [END]), 257, END)
