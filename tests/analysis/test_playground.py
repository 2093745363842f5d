"""The playground's answers against plain computations."""

import base64
import hashlib
import inspect
import json
import math
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import tiktoken_ext.openai_public
import torch
from starlette.testclient import TestClient

from basic.analysis.attention import attention_maps
from basic.analysis.playground.answers import MAX_SHOWN_TOKENS, NUM_CANDIDATES, Playground
from basic.analysis.playground.choices import PUBLISHED, find_published, find_runs, find_tokenizers
from basic.analysis.playground.server import create_app
from basic.common.errors import InvalidInputError
from basic.generation.text import complete
from basic.Tokenizer import Tokenizer
from basic.training.run_folder import Run, load_run
from basic.transformer.functional import token_losses
from tests.helpers.playground_tools import CONTEXT, END, SETTINGS, make_playground, the_run, train_two_checkpoints
from tests.helpers.tokenizer_tools import BYTES

# --- Answers --------------------------------------------------------------------------------------------------


def test_tokenizers_and_newest_run_are_found(tmp_path):
    playground = make_playground(tmp_path)
    assert {name: path.name for name, path in find_tokenizers(tmp_path).items()} == {
        "tiny": "tokenizer",
        "bytes": "bytes",
    }
    assert find_tokenizers(tmp_path / "missing") == {}
    about = playground.about()
    assert about["tokenizers"] == ["tiny", "bytes"]
    assert about["models"] == [{"name": "tiny", "checkpoints": [7], "chat": False}]
    assert playground.evaluate("the")["model"] == {
        "parameters": the_run(playground).model.num_parameters,
        "context_length": 12,
        "step": 7,
    }
    for name in ("old", "sweep/new", "no_checkpoint"):
        (tmp_path / name / "checkpoints").mkdir(parents=True)
        (tmp_path / name / "tokenizer").mkdir()
        if name != "no_checkpoint":
            (tmp_path / name / "checkpoints" / "step_00000001.safetensors").touch()
    os.utime(tmp_path / "old" / "checkpoints" / "step_00000001.safetensors", (1, 1))
    assert find_runs(tmp_path) == {"sweep/new": tmp_path / "sweep" / "new", "old": tmp_path / "old"}
    assert [model["name"] for model in playground.about()["models"]] == ["tiny", "sweep/new", "old"]


def test_published_vocabularies_are_found_where_they_are_kept(tmp_path, monkeypatch):
    cache, data = tmp_path / "cache", tmp_path / "data"
    cache.mkdir()
    data.mkdir()
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(cache))
    assert find_published(data) == {}
    about = Playground(tmp_path, data=data).about()
    assert list(about["missing"]) == ["GPT-2", "cl100k (GPT-4)", "o200k (GPT-4o)"]
    assert "tiktoken.get_encoding('o200k_base')" in about["missing"]["o200k (GPT-4o)"]
    for name, encoding, cached in PUBLISHED:
        source = inspect.getsource(getattr(tiktoken_ext.openai_public, encoding))
        (address,) = re.findall(r'"(http\S*\.tiktoken)"', source)
        assert cached == hashlib.sha1(address.encode()).hexdigest()
        (cache / cached).touch()
        assert find_published(data)[name] == cache / cached
    (data / "cl100k_base.tiktoken").touch()
    assert find_published(data)["cl100k (GPT-4)"] == data / "cl100k_base.tiktoken"
    assert Playground(tmp_path, data=data).about()["missing"] == {}


@pytest.fixture(scope="module")
def two_checkpoints(tmp_path_factory) -> Path:
    return train_two_checkpoints(tmp_path_factory.mktemp("trained"))


def test_a_checkpoint_is_chosen_and_few_stay_in_memory(two_checkpoints):
    playground = Playground(two_checkpoints, device="cpu")
    assert playground.about()["models"] == [{"name": "talks", "checkpoints": [2, 4], "chat": True}]
    for checkpoint, step in ((None, 4), (4, 4), (2, 2)):
        answer = playground.evaluate("abc", "talks", checkpoint)
        expected = load_run(two_checkpoints / "talks", checkpoint=step, device="cpu").model
        with torch.no_grad():
            losses = token_losses(expected(torch.tensor([[256, *b"ab"]]))[0], torch.tensor([*b"abc"]))
        assert answer["model"]["step"] == step
        assert answer["nats"] == pytest.approx(losses.tolist(), rel=1e-3)
    assert playground.model("talks", 2).run is playground.model("talks", 2).run
    client = TestClient(create_app(playground), base_url="http://127.0.0.1:8000")
    for fields, status in (({"checkpoint": 3}, 400), ({"model": "../talks"}, 404), ({"model": "talks"}, 200)):
        assert client.post("/api/score", json={"text": "a"} | fields).status_code == status


def test_a_run_that_vanishes_does_not_hide_the_others(tmp_path, folder, playground):
    """As while it is trained anew with --overwrite."""
    first: dict[str, Path | Run] = {}
    for name in ("a", "b"):
        shutil.copytree(folder / "tiny" / "tokenizer", tmp_path / name / "tokenizer")
        (tmp_path / name / "checkpoints").mkdir()
        first[name] = tmp_path / name
    served = Playground(tmp_path, first, data=tmp_path)
    shutil.rmtree(tmp_path / "a")
    assert [model["name"] for model in served.about()["models"]] == ["b"]
    assert served.tokenize("b", "the")["tokens"] == 1
    with pytest.raises(KeyError):
        served.tokenize("a", "the")
    with pytest.raises(InvalidInputError, match="a has no tokenizer/ folder"):
        Playground(tmp_path, first, data=tmp_path)


def test_attention_maps_are_those_of_the_model(two_checkpoints):
    playground = Playground(two_checkpoints, device="cpu")
    client = TestClient(create_app(playground), base_url="http://127.0.0.1:8000")
    answer = client.post("/api/attention", json={"text": "hello " * 20, "checkpoint": 2}).json()
    assert (len(answer["ids"]), answer["layers"], answer["heads"]) == (40, 2, 2)
    maps = attention_maps(playground.model(None, 2).run.model, answer["ids"])
    weights = np.frombuffer(base64.b64decode(answer["maps"]), np.uint8).reshape(maps.shape)
    assert np.abs(weights / 255 - maps.numpy()).max() <= 0.5 / 255 + 1e-6


def test_several_samples_have_seeds_of_their_own(playground):
    updates = list(playground.generate("the", 6, num_samples=3, seed=5, temperature=2.0))[1:]
    run = the_run(playground)
    for sample in range(3):
        text = "".join(update["text"] for update in updates if update["sample"] == sample)
        assert [text] == complete(run.model, run.tokenizer, ["the"], 6, temperature=2.0, seed=5 + sample)


def test_a_chat_answers_in_the_template(two_checkpoints):
    playground = Playground(two_checkpoints, device="cpu")
    client = TestClient(create_app(playground), base_url="http://127.0.0.1:8000")
    messages = [{"role": "user", "content": f"Hi{END}"}]
    body = SETTINGS | {"messages": messages, "max_new_tokens": 5, "top_k": 7}
    first, *updates, last = map(json.loads, client.post("/api/chat", json=body).text.splitlines())
    run = the_run(playground)
    expected = complete(run.model, run.tokenizer, [f"user:Hi{END}assistant:"], 5, top_p=0.9, top_k=7, seed=3)
    assert (first, last) == ({"forgotten": 0}, {"done": True})
    assert ["".join(update["text"] for update in updates)] == expected
    long = [{"role": role, "content": "a" * 9} for role in ("user", "assistant", "user", "assistant", "user")]
    answer = client.post("/api/chat", json=body | {"messages": long}).text
    assert json.loads(answer.splitlines()[0]) == {"forgotten": 4}


def test_without_a_template_there_is_no_chat(client):
    answer = client.post("/api/chat", json=SETTINGS | {"messages": [{"role": "user", "content": "Hi"}]})
    assert "has no chat template" in json.loads(answer.text)["error"]


@pytest.mark.parametrize(
    "text", ["", "the theme", f"a{END}{END} b", "é\u0301\u202e\0\r\n\t", "\ud83e\udd39 \ud800 the"]
)
@pytest.mark.parametrize("name", ["tiny", "bytes"])
def test_tokenize_matches_the_tokenizer(folder, playground, name, text):
    tokenizer = Tokenizer.load(find_tokenizers(folder)[name])
    ids = tokenizer.encode(text)
    answer = playground.tokenize(name, text)
    assert answer["ids"] == ids
    assert [bytes.fromhex(token) for token in answer["token_bytes"]] == [tokenizer.vocab[i] for i in ids]
    assert [ids[index] for index in answer["special"]] == [i for i in ids if i in tokenizer.special_token_ids.values()]
    data = tokenizer.decode_bytes(ids)
    assert (answer["tokens"], answer["bytes"], answer["distinct"]) == (len(ids), len(data), len(set(ids)))


def test_long_text_sends_the_first_tokens_and_counts_all(playground):
    answer = playground.tokenize("tiny", " the" * 10_000)
    assert answer["tokens"] == 10_000
    assert answer["bytes"] == 40_000
    assert answer["ids"] == [258] * MAX_SHOWN_TOKENS


def test_replaced_tokenizer_is_loaded_again(tmp_path):
    playground = make_playground(tmp_path)
    assert playground.tokenize("bytes", " the")["tokens"] == 4
    Tokenizer(BYTES | {256: b"th"}, [(b"t", b"h")], kernels=False).save(tmp_path / "bytes")
    assert playground.tokenize("bytes", " the")["tokens"] == 3


def reference_probabilities(playground, sequence, position):
    """The model's distribution at a position of a sequence of ids, from a forward pass over the ids before it."""
    with torch.no_grad():
        logits = the_run(playground).model(torch.tensor([sequence[:position]]))[0, -1, :260].double()
    return torch.exp(logits - logits.logsumexp(0))


@pytest.mark.parametrize(
    ("text", "keep_end"), [("", False), ("the then", False), ("a the b the c the d the e", False), ("x the " * 9, True)]
)
def test_losses_ranks_and_candidates_match_single_forward_passes(playground, text, keep_end):
    end_id, ids = 259, the_run(playground).tokenizer.encode(text)
    answer = playground.evaluate(text, keep_end=keep_end)
    is_end = keep_end and len(ids) > CONTEXT
    sequence = ids[-CONTEXT - 1 :] if is_end else [end_id, *ids][: CONTEXT + 1]
    evaluated = sequence if is_end else sequence[1:]
    assert (answer["tokens"], answer["ids"]) == (len(ids), evaluated)
    assert answer["first"] == (len(ids) - len(evaluated) if is_end else 0)
    nats, ranks, candidates = [], [], []
    for position in range(1, min(len(sequence), CONTEXT) + 1):
        p = reference_probabilities(playground, sequence, position)
        candidates.append(p.argsort(descending=True)[:NUM_CANDIDATES].tolist())
        if position < len(sequence):
            nats.append(-math.log(p[sequence[position]]))
            ranks.append(1 + int((p > p[sequence[position]]).sum()))
        actual = [q for _, q in answer["likeliest"][position - 1 + is_end]]
        assert actual == pytest.approx(p.sort(descending=True).values[:NUM_CANDIDATES].tolist(), rel=1e-3)
    assert answer["ranks"] == [None] * is_end + ranks
    assert answer["nats"][is_end:] == pytest.approx(nats, rel=1e-3)
    assert [[i for i, _ in position] for position in answer["likeliest"][is_end:]] == candidates
    assert {int(i) for i in answer["names"]} == {i for position in candidates for i in position}
    if nats:
        assert answer["mean_nats"] == pytest.approx(sum(nats) / len(nats))
        num_bytes = sum(len(bytes.fromhex(token)) for token in answer["token_bytes"][is_end:])
        assert answer["bits_per_byte"] == pytest.approx(sum(nats) / math.log(2) / num_bytes)
    else:
        assert answer["mean_nats"] is answer["bits_per_byte"] is None


def test_first_token_has_no_loss_without_an_end_of_text_token(tmp_path):
    answer = make_playground(tmp_path, ()).evaluate("the a")
    assert answer["nats"][0] is answer["ranks"][0] is answer["likeliest"][0] is None
    assert len(answer["nats"]) == len(answer["ids"]) == 3
    assert len(answer["likeliest"]) == 4
    assert make_playground(tmp_path, ()).evaluate("")["likeliest"] == []


def test_without_a_run_there_is_no_model(tmp_path):
    make_playground(tmp_path)
    client = TestClient(create_app(Playground(tmp_path)), base_url="http://localhost:1")
    assert client.get("/api/about").json()["models"] == []
    answer = client.post("/api/score", json={"text": "a"})
    assert (answer.status_code, "there is no model yet" in answer.json()["error"]) == (400, True)
