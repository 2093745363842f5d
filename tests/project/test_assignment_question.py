"""The written questions: formulas against counts in the real modules, other answers against direct computations."""

import math
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from basic import assignment_question
from basic.analysis import accounting
from basic.common.errors import BasicError, InvalidInputError
from basic.model import AdamW, Linear, ModelConfig, RMSNorm, TransformerLM
from basic.train_bpe import train_bpe
from basic.transformer import functional
from basic.transformer.functional import cross_entropy, linear
from basic.transformer.kernels.dispatch import use_operators

# All sizes differ, so that a formula with a wrong letter gives a wrong number.
SMALL = ModelConfig(vocab_size=67, context_length=11, d_model=24, num_layers=3, num_heads=4, d_ff=40)
BATCH_SIZE = 5


@pytest.fixture(autouse=True)
def plain_operations() -> Iterator[None]:
    """What the formulas count; the operators for a CPU compute less, in other shapes."""
    with use_operators(None):
        yield


@pytest.fixture(scope="module")
def corpora(tmp_path_factory):
    """Two small corpora with different words."""
    folder = tmp_path_factory.mktemp("corpora")
    (folder / "first.txt").write_text(
        "".join(f"The cat number {i} sat on the grandmotherly mat.<|endoftext|>" for i in range(40))
    )
    (folder / "other.txt").write_text(
        "".join(f"Shares in {i} petrochemicals fell; petrochemicals rose.<|endoftext|>" for i in range(40))
    )
    return assignment_question.Corpora(
        corpus=folder / "first.txt", other_corpus=folder / "other.txt", vocab_size=300, other_vocab_size=310
    )


def small_model():
    torch.manual_seed(0)
    return TransformerLM(SMALL), torch.randint(SMALL.vocab_size, (BATCH_SIZE, SMALL.context_length))


# --- Formulas against the modules -----------------------------------------------------------------------------


def test_parameters_match_the_model():
    model, _ = small_model()
    counted = Counter()
    for name, parameter in model.named_parameters():
        if "attn" in name:
            counted["attention: Q, K, V, output"] += parameter.numel()
        elif "ffn" in name:
            counted["feed-forward: W1, W2, W3"] += parameter.numel()
        elif "layers" in name:
            counted["norms of the blocks"] += parameter.numel()
        else:
            names = {"token_embeddings": "token embeddings", "ln_final": "final norm", "lm_head": "output embedding"}
            counted[names[name.split(".")[0]]] += parameter.numel()
    assert accounting.evaluate_formulas(accounting.PARAMETERS, SMALL) == counted
    assert accounting.num_parameters(SMALL) == sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("size", accounting.GPT2_SIZES)
def test_parameters_of_gpt2_match_the_model(size):
    config = accounting.gpt2_config(size)
    with torch.device("meta"):
        model = TransformerLM(config)
    assert accounting.num_parameters(config) == sum(parameter.numel() for parameter in model.parameters())


def test_forward_flops_match_the_operations():
    model, token_ids = small_model()
    with FlopCounterMode(display=False) as counter:
        model(token_ids)
    formula = accounting.forward_flops(SMALL, BATCH_SIZE)
    assert sum(formula.values()) == counter.get_total_flops()
    assert sum(formula.values()) == model.matmul_flops_per_token() * token_ids.numel()


def test_each_matrix_multiplication_matches_an_operation():
    """Compare shapes and counts, not only the sum."""
    model, token_ids = small_model()
    actual = Counter()

    class MatrixMultiplications(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args: Any = (), kwargs=None):
            name = func.overloadpacket.__name__
            if name in {"mm", "bmm"}:
                (*_, rows, inner), columns = args[0].shape, args[1].shape[-1]
                batch = args[0].shape[0] if name == "bmm" else 1
                # Q, K and V are one multiplication with packed weights, and so are W1 and W3.
                num_packed = {3 * SMALL.d_model: 3, 2 * (SMALL.d_ff or 0): 2}.get(columns, 1)
                actual[batch * rows, inner, columns // num_packed] += num_packed
            return func(*args, **(kwargs or {}))

    with MatrixMultiplications(), torch.no_grad():
        model(token_ids)
    expected = Counter()
    for multiplication in accounting.MATRIX_MULTIPLICATIONS.values():
        count, rows, inner, columns = (accounting.evaluate_formula(size, SMALL) for size in multiplication)
        heads = SMALL.num_heads if "h" in multiplication.count else 1
        expected[BATCH_SIZE * heads * rows, inner, columns] += count // heads
    assert actual == expected


def test_activations_match_the_modules(monkeypatch):
    """Compare each formula with the size of the output of its operation."""
    model, token_ids = small_model()
    counted = Counter()

    def count(item):
        return lambda module, inputs, output: counted.update({item: output.numel()})

    linears = {"q_proj": "Q, K, V projections", "k_proj": "Q, K, V projections", "v_proj": "Q, K, V projections"}
    linears |= {"output_proj": "output projection", "w1": "W1", "w2": "W2", "w3": "W3", "lm_head": "output embedding"}

    for name, module in model.named_modules():
        if isinstance(module, RMSNorm):
            module.register_forward_hook(count("final norm" if name == "ln_final" else "norms of the blocks"))
        elif isinstance(module, Linear):
            module.register_forward_hook(count(linears[name.split(".")[-1]]))

    def counting(function, name_of):
        def counted_function(*args):
            result = function(*args)
            counted.update({name_of(args): result.numel()})
            return result

        return counted_function

    def count_linear(x, *weights):
        """Inside `causal_self_attention` and `swiglu`; the modules call the `linear` that `basic.model` imported."""
        result = linear(x, *weights)
        if len(weights) == 3:
            counted["Q, K, V projections"] += result.numel()
        elif len(weights) == 2:
            counted.update({"W1": result.numel() // 2, "W3": result.numel() // 2})
        else:
            counted.update({"elementwise product": x.numel(), "W2": result.numel()})
        return result

    monkeypatch.setattr(functional, "linear", count_linear)
    monkeypatch.setattr(functional, "silu", counting(functional.silu, lambda args: "SiLU"))
    monkeypatch.setattr(functional, "softmax", counting(functional.softmax, lambda args: "softmax"))
    contraction = counting(
        functional.einsum, lambda args: "Q K^T" if args[-1].endswith("queries keys") else "weighted sum of V"
    )
    monkeypatch.setattr(functional, "einsum", contraction)
    logits = model(token_ids)

    # The cross-entropy saves at least a tensor of the size of the logits for its gradient.
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor.numel()) or tensor, lambda x: x):
        cross_entropy(logits, token_ids)
    counted["cross-entropy"] = max(saved)
    assert accounting.evaluate_formulas(accounting.ACTIVATIONS, SMALL, BATCH_SIZE) == counted


def test_training_memory_matches_parameters_gradients_and_optimizer():
    model, token_ids = small_model()
    optimizer = AdamW(model.parameters())
    cross_entropy(model(token_ids), token_ids).backward()
    optimizer.step()

    def size_bytes(tensors):
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    states = [value for state in optimizer.state.values() for value in state.values() if torch.is_tensor(value)]
    memory = accounting.training_memory_bytes(SMALL, BATCH_SIZE)
    assert memory["parameters"] == size_bytes(model.parameters())
    assert memory["gradients"] == size_bytes(parameter.grad for parameter in model.parameters())
    assert memory["optimizer state"] == size_bytes(states)
    assert memory["activations"] == 4 * sum(
        accounting.evaluate_formulas(accounting.ACTIVATIONS, SMALL, BATCH_SIZE).values()
    )


def test_adamw_flops_match_the_operations():
    """Count +, *, / and sqrt per element in the tensor operations of a step."""
    per_number = {"mul": 1, "lerp_": 3, "addcmul_": 3, "sqrt": 1, "mul_": 1, "add_": 1, "addcdiv_": 3, "detach": 0}
    flops = 0

    class Elementwise(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args: Any = (), kwargs=None):
            nonlocal flops
            name = func.overloadpacket.__name__
            if not name.startswith("_record_function"):  # only for the profiler
                flops += per_number[name] * args[0].numel()
            return func(*args, **(kwargs or {}))

    parameter = torch.nn.Parameter(torch.randn(7, 9))
    optimizer = AdamW([parameter], lr=1e-3, weight_decay=0.1)
    parameter.grad = torch.randn(7, 9)
    optimizer.step()  # creates the state
    with use_operators(None), Elementwise():
        optimizer.step()
    assert accounting.adamw_flops(parameter.numel()) == flops


def test_training_flops_are_forward_backward_and_optimizer():
    model, token_ids = small_model()
    with FlopCounterMode(display=False) as counter:
        cross_entropy(model(token_ids), token_ids).backward()
    optimizer = accounting.adamw_flops(model.num_parameters)
    assert accounting.training_flops(SMALL, BATCH_SIZE) == counter.get_total_flops() + optimizer


def test_formulas_reject_another_architecture():
    with pytest.raises(InvalidInputError, match="tied_embeddings=False, got True"):
        accounting.num_parameters(
            ModelConfig(vocab_size=9, context_length=4, d_model=8, num_layers=1, num_heads=2, tied_embeddings=True)
        )


# --- Answers --------------------------------------------------------------------------------------------------


def test_unicode1():
    values = assignment_question.unicode1().values
    assert values["name"] == "NULL"
    alone, in_text = values["chr(0)"]
    assert (alone["repr"], alone["printed bytes"]) == (r"'\x00'", b"\x00")
    assert alone["visible characters"] == 0
    assert in_text["characters"] == in_text["visible characters"] + 1
    assert "\0" not in str(assignment_question.unicode1())  # some terminals and tools cannot handle it


def test_unicode2():
    values = assignment_question.unicode2().values
    with pytest.raises(UnicodeDecodeError):
        values["two bytes that are not UTF-8"].decode()
    assert len(values["two bytes that are not UTF-8"]) == 2
    # Two ASCII characters, or one of U+0080 to U+07FF.
    assert values["such pairs, of all 65,536"] == 65_536 - 128**2 - (0x800 - 0x80)
    assert "can't decode byte 0xc3" in values["the error"]
    english, *_, emoji = values["bytes in three encodings, and how many of them are zero (in UTF-8 none)"]
    assert english["UTF-8"] == english["characters"] == english["UTF-16"] // 2 == english["UTF-32"] // 4
    assert emoji["UTF-8"] == emoji["UTF-32"] == 4 * emoji["characters"]


def test_train_bpe_tinystories(corpora):
    values = assignment_question.train_bpe_tinystories(corpora).values
    (row,) = values["training"]
    assert row["corpus"] == "first.txt"
    assert row["vocabulary"] == 300
    assert len(row["longest token"]) == max(len(token) for i, token in corpora.first().training().vocab.items() if i)
    assert 0 < row["of it counting, s"] < row["time, s"]
    assert values["slower stage"] in {"counting", "merging"}
    assert 50 <= values["its share of the time, %"] <= 100


def test_measured_training_equals_train_bpe(corpora):
    training = corpora.first().training()
    assert (training.vocab, training.merges) == train_bpe(corpora.corpus, 300, [assignment_question.SEPARATOR])


def test_peak_memory_is_measured_in_a_process_without_torch(corpora):
    pytest.importorskip("resource", reason="peak memory needs the resource module")
    here_bytes = assignment_question._peak_memory_bytes()  # with torch, hundreds of MB
    assert 5e6 < corpora.first().training().peak_memory_bytes < here_bytes / 2


def test_train_bpe_expts_owt(corpora):
    values = assignment_question.train_bpe_expts_owt(corpora).values
    first, other = (set(corpus.training().vocab.values()) for corpus in (corpora.first(), corpora.other()))
    num_first_tokens = 257
    assert values["learned tokens in both"] == len(first & other) - num_first_tokens
    assert [row["vocabulary"] for row in values["training"]] == [300, 310]


def test_tokenizer_experiments(corpora):
    values = assignment_question.tokenizer_experiments(corpora).values
    on_first, on_other = values["bytes per token"]
    assert on_first["documents"] == "10 of first.txt"
    assert on_first["tokenizer of the first"] > on_first["tokenizer of the other"] >= 1
    assert on_other["tokenizer of the other"] > on_other["tokenizer of the first"] >= 1
    for row, largest_id in zip(
        values["throughput of one process, time for the Pile, and ids"], (299, 309), strict=True
    ):
        assert row["825 GB, hours"] == pytest.approx(825e9 / (row["MB/s"] * 1e6) / 3600)
        assert (row["largest id"], row["dtype"]) == (largest_id, "uint16")


def test_bytes_per_token_counts_bytes_not_characters(corpora):
    tokenizer = corpora.first().training().tokenizer()
    assert assignment_question.bytes_per_token(tokenizer, ["é", "日本"]) == 1


def test_documents_are_complete(tmp_path):
    path = tmp_path / "three.txt"
    path.write_text("one<|endoftext|>two<|endoftext|>three")
    corpus = assignment_question.Corpus("three", path, 300)
    assert corpus.documents() == ["one", "two", "three"]
    assert corpus.documents(size_bytes=35) == ["one", "two"]
    with pytest.raises(InvalidInputError, match=r"no complete document in its first 2 bytes; put <\|endoftext\|>"):
        corpus.documents(size_bytes=2)


def test_embedded_stories_are_the_default():
    corpora = assignment_question.Corpora(seed=3)
    assert (corpora.first().label, corpora.first().vocab_size) == ("stories, seed 3", 1_000)
    assert (corpora.other().label, corpora.other().vocab_size) == ("stories, seed 4", 2_000)
    assert len(corpora.first().documents()) == 9_000
    assert corpora.first().path.stat().st_size > 2_000_000


def test_default_vocabulary_sizes_for_files_are_those_of_the_assignment(tmp_path):
    corpora = assignment_question.Corpora(corpus=tmp_path / "a.txt", other_corpus=tmp_path / "b.txt")
    assert (corpora.first().vocab_size, corpora.other().vocab_size) == (10_000, 32_000)


def test_transformer_accounting():
    values = assignment_question.transformer_accounting().values
    # By hand: 2 * 50,257 * 1,600 + 48 * (4 * 1,600^2 + 3 * 1,600 * 4,288 + 2 * 1,600) + 1,600
    assert values["parameters of XL"] == 1_640_452_800
    assert values["in fp32, GB"] == pytest.approx(6.5618112)
    assert sum(row["numbers"] for row in values["parameters of XL by layer type"]) == values["parameters of XL"]
    multiplications = values["matrix multiplications of XL, context 1,024"]
    assert sum(row["FLOPs"] for row in multiplications) == values["FLOPs of a forward pass of XL"]
    assert multiplications[0]["matrices"] == "(1024 x 1600) (1600 x 1600)"
    assert [row["d_ff"] for row in values["models"]] == [2048, 2752, 3392, 4288, 4288]
    for model in ("small", "medium", "large", "XL", "XL, 16,384"):
        assert sum(row[model] for row in values["share of the FLOPs, %"]) == pytest.approx(100)
    assert values["ratio of FLOPs, context 16,384 to 1,024"] == pytest.approx(37.98, abs=0.01)


def test_learning_rate_tuning():
    values = assignment_question.learning_rate_tuning(seed=2).values
    assert [values[f"lr {lr}"] for lr in (10, 100, 1000)] == ["decays", "decays", "diverges"]
    assert [row["after step"] for row in values["loss"]] == list(range(11))


@pytest.mark.parametrize("lr", [10, 1000])
def test_toy_losses_follow_the_closed_form(lr):
    losses = assignment_question.toy_losses(lr, num_steps=10, seed=1)
    factors = [1 - lr / (50 * math.sqrt(t + 1)) for t in range(10)]
    expected = [losses[0] * math.prod(factors[:t]) ** 2 for t in range(11)]
    assert losses == pytest.approx(expected, rel=1e-4)
    assert 10 < losses[0] < 50  # near 25, the mean square of 5 times a standard normal


def test_adamw_accounting():
    values = assignment_question.adamw_accounting().values
    assert values["XL, GB"] == "16.37 * batch + 26.25"
    assert values["largest batch in 80 GB"] == 3
    xl = accounting.gpt2_config("XL")
    total = {batch_size: sum(accounting.training_memory_bytes(xl, batch_size).values()) for batch_size in (3, 4)}
    assert total[3] <= 80e9 < total[4]
    assert values["FLOPs of one AdamW step, XL"] == 14 * 1_640_452_800
    flops = 400_000 * 1024 * 3 * 3_516_769_894_400
    assert values["400,000 steps of 1,024, hours"] == pytest.approx(flops / 247.5e12 / 3600, rel=1e-5)


# --- Printing and command line --------------------------------------------------------------------------------


def test_answer_is_printed_as_values_tables_and_explanation():
    answer = assignment_question.Answer(
        "name", {"a count": 1234, "ab": [{"text": "x", "n": 10}, {"text": "long", "n": 2.5}], "b": b"\xff"}, "So it is."
    )
    assert str(answer) == (
        "name\n====\n\na count  1,234\nb        b'\\xff'\n\nab:\n  text    n\n  x      10\n  long  2.5\n\nSo it is."
    )


def test_questions_are_those_of_the_assignment():
    assert list(assignment_question.questions()) == [
        "unicode1",
        "unicode2",
        "train_bpe_tinystories",
        "train_bpe_expts_owt",
        "tokenizer_experiments",
        "transformer_accounting",
        "learning_rate_tuning",
        "adamw_accounting",
    ]


def test_all_prints_every_answer_in_order(corpora, capsys):
    assignment_question.main("all", corpora)
    page = capsys.readouterr().out
    titles = [f"{name}\n{'=' * len(name)}\n" for name in assignment_question.questions()]
    positions = [page.index(title) for title in titles]
    assert positions == sorted(positions)


def test_module_prints_one_answer_without_torch():
    program = [sys.executable, "-X", "importtime", "-m", "basic.assignment_question", "unicode2"]
    result = subprocess.run(program, capture_output=True, text=True, check=True, encoding="utf-8")
    assert result.stdout.startswith("unicode2\n========\n")
    assert result.stdout.rstrip() == str(assignment_question.unicode2())
    imported = {line.split("|")[-1].strip() for line in result.stderr.splitlines()}
    assert "basic.train_bpe" in imported
    assert "torch" not in imported


def test_unknown_question_is_an_error_that_lists_the_questions():
    with pytest.raises(InvalidInputError, match=r"there is no question 'unicode3'.*unicode2.*adamw_accounting"):
        assignment_question.main("unicode3")


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"corpus": "missing.txt"}, "missing.txt"), ({"vocab_size": 256}, "at least 257, got 256")],
)
def test_invalid_corpora_are_errors_of_the_user(settings, message, corpora, tmp_path):
    path = tmp_path / settings["corpus"] if "corpus" in settings else corpora.corpus
    wrong = assignment_question.Corpora(corpus=path, vocab_size=settings.get("vocab_size", 300))
    with pytest.raises((BasicError, OSError), match=message):
        assignment_question.main("train_bpe_tinystories", wrong)
