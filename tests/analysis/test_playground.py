"""The playground's answers against plain computations, and its server: API, limits and security headers."""

import base64
import hashlib
import inspect
import json
import math
import os
import re
import runpy
import shutil
import socket
import sys
import threading
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

import anyio
import httpx2 as httpx
import numpy as np
import pytest
import tiktoken_ext.openai_public
import torch
import uvicorn
from starlette.testclient import TestClient

from basic.analysis.attention import attention_maps
from basic.analysis.playground.answers import MAX_SHOWN_TOKENS, NUM_CANDIDATES, Playground
from basic.analysis.playground.choices import PUBLISHED, find_published, find_runs, find_tokenizers
from basic.analysis.playground.server import MAX_SHORT_BYTES, MAX_TEXT_CHARACTERS, TimedProtocol, create_app
from basic.common.errors import InvalidInputError
from basic.formats.tokenizers import save_tiktoken
from basic.generation.text import complete
from basic.model import ModelConfig, TransformerLM
from basic.Tokenizer import Tokenizer
from basic.tokenizer_files.content import ChatTemplate
from basic.training.loop import train
from basic.training.run_folder import Run, load_run
from basic.training.settings import RunConfig, TrainConfig
from basic.transformer.functional import token_losses

END = "<|endoftext|>"
MERGES = [(b"t", b"h"), (b"th", b"e"), (b" ", b"the")]
CONTEXT = 12


def make_playground(
    folder: Path, special_tokens: tuple[str, ...] = (END,), playground_class: type[Playground] = Playground
) -> Playground:
    """A folder with a run, whose untrained model has large logits, and a tokenizer folder beside the run."""
    tokens = [bytes([i]) for i in range(256)] + [left + right for left, right in MERGES]
    Tokenizer(dict(enumerate(tokens)), MERGES, special_tokens, kernels=False).save(folder / "tiny" / "tokenizer")
    Tokenizer(dict(enumerate(tokens[:256])), [], kernels=False).save(folder / "bytes")
    (folder / "notes.txt").write_text("nothing")
    torch.manual_seed(0)
    # The model's vocabulary is larger than the tokenizer's; the extra ids must never appear.
    shape = ModelConfig(vocab_size=300, context_length=CONTEXT, d_model=16, num_layers=1, num_heads=2)
    model = TransformerLM(shape).eval()
    with torch.no_grad():
        model.lm_head.weight.mul_(6)
    run = Run(model, RunConfig(model=shape, train=TrainConfig(steps=1)), folder / "tiny" / "tokenizer", 7)
    return playground_class(folder, {"tiny": run}, data=folder)


def the_run(playground: Playground) -> Run:
    return playground.model().run


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def playground(folder) -> Playground:
    return make_playground(folder)


@pytest.fixture(scope="module")
def client(playground) -> TestClient:
    return TestClient(create_app(playground), base_url="http://127.0.0.1:8000")


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


def train_two_checkpoints(folder: Path) -> Path:
    """A folder with a trained run of a tokenizer that has a chat template."""
    vocab = {byte: bytes([byte]) for byte in range(256)}
    source = "{% for m in messages %}{{ m.role }}:{{ m.content }}<|endoftext|>{% endfor %}"
    source += "{% if add_generation_prompt %}assistant:{% endif %}"
    tokenizer = Tokenizer(vocab, [], [END], kernels=False, chat_template=ChatTemplate(source=source, tokens={}))
    model = ModelConfig(vocab_size=257, context_length=40, d_model=16, num_layers=2, num_heads=2)
    settings = TrainConfig(steps=4, batch_size=2, eval_interval=4, eval_batches=1, checkpoint_interval=2, device="cpu")
    ids = np.arange(600) % 257
    train(RunConfig(model=model, train=settings), ids, ids, folder / "talks", tokenizer=tokenizer)
    return folder


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
    Tokenizer({i: bytes([i]) for i in range(256)} | {256: b"th"}, [(b"t", b"h")], kernels=False).save(
        tmp_path / "bytes"
    )
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


# --- The server -----------------------------------------------------------------------------------------------

SETTINGS = {"prompt": "the", "max_new_tokens": 6, "temperature": 1.0, "top_p": 0.9, "seed": 3}


@pytest.mark.parametrize("prompt", ["the", "", "the " * 40])
def test_generate_streams_json_lines(client, playground, prompt):
    tokenizer = the_run(playground).tokenizer
    response = client.post("/api/generate", json=SETTINGS | {"prompt": prompt})
    first, *updates, last = map(json.loads, response.text.splitlines())
    num_tokens = len(tokenizer.encode(prompt))
    assert first == {"tokens": num_tokens, "seen": min(num_tokens, CONTEXT)}
    assert last == {"done": True}
    expected = complete(the_run(playground).model, tokenizer, [prompt or END], 6, top_p=0.9, seed=3)
    assert ["".join(update["text"] for update in updates)] == expected
    assert len(updates) > 1


def test_generation_stops_when_the_client_disconnects_and_the_next_request_starts(tmp_path):
    updates = []

    class Endless(Playground):
        def generate(self, *arguments, **options):
            while True:
                updates.append({"text": "x"})
                yield updates[-1]

    app = create_app(make_playground(tmp_path, playground_class=Endless))
    scope = {
        **{"type": "http", "asgi": {"version": "3.0", "spec_version": "2.3"}, "http_version": "1.1"},
        **{"method": "POST", "scheme": "http", "path": "/api/generate", "raw_path": b"/api/generate", "root_path": ""},
        **{"query_string": b"", "client": ("127.0.0.1", 1), "server": ("127.0.0.1", 8000)},
        "headers": [
            *[(b"host", b"127.0.0.1:8000"), (b"content-type", b"application/json")],
            (b"content-length", str(len(json.dumps(SETTINGS))).encode()),
        ],
    }

    async def listen(num_lines: int) -> None:
        """Send a request, receive so many lines, and disconnect."""
        disconnected = anyio.Event()
        num_left = num_lines
        request = [{"type": "http.request", "body": json.dumps(SETTINGS).encode(), "more_body": False}]

        async def receive():
            if request:
                return request.pop()
            await disconnected.wait()
            return {"type": "http.disconnect"}

        async def send(message):
            nonlocal num_left
            num_left -= message["type"] == "http.response.body"
            if num_left == 0:
                disconnected.set()
            await anyio.sleep(0)

        await app(scope, receive, send)

    async def twice() -> None:
        with anyio.fail_after(30):
            await listen(5)
            await listen(3)

    anyio.run(twice)
    assert 8 <= len(updates) < 100


@pytest.mark.parametrize("name", ["../tiny/tokenizer", "tiny/tokenizer", "..", "/etc", "notes.txt", "", "GPT-2"])
def test_unknown_tokenizer_names_and_paths_are_not_found(client, name, folder):
    answer = client.post("/api/tokenize", json={"tokenizer": name, "text": "x"})
    assert answer.status_code == 404
    assert "no tokenizer" in answer.json()["error"]
    assert str(folder) not in answer.text


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 200),
        ({"host": "localhost:8000", "origin": "http://localhost:8000", "sec-fetch-site": "same-origin"}, 200),
        ({"host": "192.168.0.7:8000"}, 200),  # an address needs no DNS
        ({"host": "[::1]:8000", "origin": "http://[::1]:8000"}, 200),
        ({"host": "attacker.example"}, 403),
        ({"host": "127.0.0.1.attacker.example:8000"}, 403),
        ({"host": "localhost.attacker.example"}, 403),
        ({"host": ""}, 403),
        ({"host": "[::1"}, 403),
        ({"origin": "http://attacker.example"}, 403),
        ({"origin": "null"}, 403),
        ({"origin": "http://127.0.0.1:9000"}, 403),
        ({"sec-fetch-site": "cross-site"}, 403),
        ({"sec-fetch-site": "same-site"}, 403),
        ({"content-type": "text/plain"}, 415),
        ({"content-type": "application/x-www-form-urlencoded"}, 415),
    ],
)
def test_requests_from_other_sites_are_rejected(client, headers, status):
    content = json.dumps({"tokenizer": "tiny", "text": "the"})
    answer = client.post("/api/tokenize", content=content, headers={"content-type": "application/json"} | headers)
    assert answer.status_code == status
    assert ("error" in answer.json()) == (status != 200)
    if "host" in headers:
        assert client.get("/", headers=headers).status_code == (200 if status == 200 else 403)


def test_host_name_of_the_server_is_allowed(playground):
    client = TestClient(create_app(playground, host="lab.example"), base_url="http://LAB.example:8000")
    assert client.get("/api/about").status_code == 200


@pytest.mark.parametrize(
    ("path", "body", "message"),
    [
        ("tokenize", "{", "the request is not JSON"),
        ("tokenize", "[" * 100_000, "the request is not JSON"),
        ("tokenize", "[]", "the request must be a JSON object"),
        ("tokenize", {"tokenizer": "tiny"}, "text must be a string, got None"),
        ("tokenize", {"tokenizer": 3, "text": ""}, "tokenizer must be a string, got 3"),
        ("score", {"text": ["a"]}, "text must be a string, got ['a']"),
        ("score", {"text": "", "keep_end": 1}, "keep_end must be true or false, got 1"),
        ("generate", SETTINGS | {"max_new_tokens": 0}, "max_new_tokens must be an integer from 1 to 1,000, got 0"),
        (
            "generate",
            SETTINGS | {"max_new_tokens": 1.5},
            "max_new_tokens must be an integer from 1 to 1,000, got 1.5",
        ),
        ("generate", SETTINGS | {"temperature": -1}, "temperature must be a number from 0 to 10, got -1"),
        ("generate", SETTINGS | {"temperature": True}, "temperature must be a number from 0 to 10, got True"),
        (
            "generate",
            json.dumps(SETTINGS | {"temperature": math.nan}),
            "temperature must be a number from 0 to 10, got nan",
        ),
        ("generate", SETTINGS | {"top_p": 0}, "top_p must be a number from 1e-06 to 1, got 0"),
        ("generate", SETTINGS | {"seed": -1}, "seed must be an integer from 0 to"),
        ("generate", SETTINGS | {"top_k": 0}, "top_k must be an integer from 1 to"),
        ("generate", SETTINGS | {"num_samples": 99}, "num_samples must be an integer from 1 to 16, got 99"),
        ("chat", SETTINGS | {"messages": []}, "messages must be a list of 1 to 1,000 messages, got []"),
        ("chat", SETTINGS | {"messages": [{"role": "user"}]}, "messages must have messages with a role and a content"),
        ("attention", {"text": "a", "checkpoint": "best"}, "checkpoint must be an integer from 0 to"),
    ],
)
def test_invalid_request_is_answered_with_an_error(client, path, body, message):
    content = body if isinstance(body, str) else json.dumps(body)
    answer = client.post(f"/api/{path}", content=content, headers={"content-type": "application/json"})
    assert answer.status_code == 400
    assert answer.json()["error"].startswith(message)


def test_too_long_text_is_rejected(playground):
    client = TestClient(create_app(playground, max_text_characters=500), base_url="http://127.0.0.1:8000")
    assert client.get("/api/about").json()["limits"]["characters"] == 500
    assert client.post("/api/score", json={"text": "a" * 501}).json() == {
        "error": "text has 501 characters; at most 500 are allowed"
    }
    answer = client.post("/api/score", json={"text": "a" * (6 * 500 + 4097)})
    assert (answer.status_code, "too long" in answer.json()["error"]) == (413, True)
    assert MAX_TEXT_CHARACTERS >= 5_000_000


def test_a_text_that_a_pattern_splits_too_slowly_is_an_error(tmp_path, monkeypatch):
    make_playground(tmp_path)
    slow = Tokenizer({i: bytes([i]) for i in range(256)}, [], pattern="(?:a|aa)+b|.")
    slow.save(tmp_path / "slow")
    client = TestClient(create_app(Playground(tmp_path)), base_url="http://localhost:1")
    text = "the b aab"
    answer = client.post("/api/tokenize", json={"tokenizer": "slow", "text": text})
    assert answer.json()["ids"] == slow.encode(text)
    monkeypatch.setattr("basic.analysis.playground.answers.MAX_PATTERN_S", 0.1)
    answer = client.post("/api/tokenize", json={"tokenizer": "slow", "text": "a" * 2000})
    assert answer.status_code == 400
    assert answer.json()["error"] == (
        "the tokenizer's pattern '(?:a|aa)+b|.' needs more than 0.1 s for this text; use a shorter text or another "
        "tokenizer"
    )


def test_a_request_needs_a_length(client):
    answer = client.post("/api/score", content=iter([b'{"text": "a"}']), headers={"content-type": "application/json"})
    assert (answer.status_code, answer.json()["error"]) == (411, "the request must have a Content-Length header")


# --- Connections ----------------------------------------------------------------------------------------------


@contextmanager
def served(playground: Playground) -> Generator[int]:
    """Serve a playground, whose clients have little time, from a thread; yields the port."""

    class Impatient(TimedProtocol):
        timeout_s = 0.3

    listener = socket.create_server(("127.0.0.1", 0))
    config = uvicorn.Config(create_app(playground), http=Impatient, log_level="critical", lifespan="off")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        yield listener.getsockname()[1]
    finally:
        server.should_exit = True
        thread.join(60)
        listener.close()


def head(path: str, length: int) -> bytes:
    lines = [f"POST /api/{path} HTTP/1.1", "Host: localhost", "Content-Type: application/json"]
    return "\r\n".join([*lines, f"Content-Length: {length}", "", ""]).encode()


@pytest.mark.parametrize(
    "start",
    [b"", b"POST /api/score HTTP/1.1\r\nHost: loc", head("score", 30) + b'{"te', head("score", 1 << 20) + b'{"'],
)
def test_a_client_that_does_not_send_its_request_is_disconnected(playground, start):
    with served(playground) as port, socket.create_connection(("127.0.0.1", port), timeout=60) as slow:
        slow.sendall(start)
        try:
            answer = slow.recv(100)
        except ConnectionResetError:
            answer = b""
        assert answer == b""


def test_a_client_that_does_not_read_the_answer_does_not_stop_the_next_one(tmp_path):
    has_started = threading.Event()

    class FirstIsEndless(Playground):
        def generate(self, *arguments, **options):
            while not has_started.is_set() or options["seed"] == 3:
                has_started.set()
                yield {"text": "x" * 100_000}
            yield {"text": "x"}

    body = json.dumps(SETTINGS).encode()
    playground = make_playground(tmp_path, playground_class=FirstIsEndless)
    with served(playground) as port, socket.create_connection(("127.0.0.1", port), timeout=60) as slow:
        slow.sendall(head("generate", len(body)) + body)
        assert has_started.wait(60)
        answer = httpx.post(f"http://localhost:{port}/api/generate", json=SETTINGS | {"seed": 4}, timeout=60)
        assert [*map(json.loads, answer.text.splitlines())] == [{"text": "x"}, {"done": True}]


def test_short_requests_do_not_wait_for_large_ones(tmp_path):
    may_end, has_started = threading.Event(), threading.Event()
    num_large = 0

    class Slow(Playground):
        def tokenize(self, tokenizer_id, text):
            nonlocal num_large
            if len(text) > 3:
                num_large += 1
                has_started.set()
                assert may_end.wait(60)
                num_large -= 1
            return {"tokens": num_large}

    async def requests() -> list[dict]:
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost", timeout=60) as client:
            async with anyio.create_task_group() as tasks:
                answers = []

                async def post(text: str) -> None:
                    answers.append(
                        (await client.post("/api/tokenize", json={"tokenizer": "tiny", "text": text})).json()
                    )

                for _ in range(2):
                    tasks.start_soon(post, "a" * (MAX_SHORT_BYTES + 1))
                await anyio.to_thread.run_sync(has_started.wait, 60)
                await post("the")
                may_end.set()
            return answers

    app = create_app(make_playground(tmp_path, playground_class=Slow))
    # The short one is answered while one large one is computed; the other large one waits.
    assert anyio.run(requests) == [{"tokens": 1}, {"tokens": 0}, {"tokens": 0}]


def test_unknown_paths_and_methods_are_json_errors(client):
    for path in ("/api/nothing", "/playground.py", "/..%2fREADME.md"):
        assert (client.get(path).status_code, client.get(path).json()) == (404, {"error": "Not Found"})
    assert client.get("/api/score").status_code == 405


def test_page_is_self_contained_and_has_a_strict_policy(client):
    answer = client.get("/")
    policy = dict(directive.split(" ", 1) for directive in answer.headers["content-security-policy"].split("; "))
    assert policy["default-src"] == "'none'"
    assert policy["connect-src"] == "'self'"
    assert "unsafe" not in answer.headers["content-security-policy"]
    for tag, directive in (("script", "script-src"), ("style", "style-src")):
        (content,) = re.findall(rf"<{tag}>(.*?)</{tag}>", answer.text, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        assert len(content) > 1000
        assert policy[directive] == f"'sha256-{digest}'"
    page = answer.text.replace("http://www.w3.org/2000/svg", "")
    for word in (
        "http:",
        "https:",
        "innerHTML",
        "outerHTML",
        "insertAdjacentHTML",
        "document.write",
        "eval(",
        " style=",
    ):
        assert word not in page, word


# --- The script -----------------------------------------------------------------------------------------------


def run_script(monkeypatch, *arguments: object) -> None:
    path = Path(__file__).resolve().parents[2] / "local" / "playground.py"
    monkeypatch.setattr("sys.argv", [str(path), *map(str, arguments)])
    runpy.run_path(str(path), run_name="__main__")


def test_script_listens_on_localhost_by_default(playground, folder, monkeypatch, capsys):
    served = []
    monkeypatch.setattr("uvicorn.Server.run", lambda server, sockets: served.append((server.config.app, sockets[0])))
    run_script(monkeypatch, "--runs", folder, "--port", 0)
    ((app, listener),) = served
    host, port = listener.getsockname()
    listener.close()
    assert host == "127.0.0.1"
    output = capsys.readouterr().out
    assert f"open        http://127.0.0.1:{port}/" in output
    assert output.startswith("starting the playground ...\n")
    assert "tokenizers  bytes, tiny\nmodels      none yet" in output
    client = TestClient(app, base_url=f"http://127.0.0.1:{port}")
    assert client.get("/api/about").json()["tokenizers"] == ["bytes", "tiny"]


@pytest.mark.parametrize("name", ["uvicorn", "starlette"])
def test_script_says_how_to_install_what_is_missing(folder, monkeypatch, name):
    monkeypatch.delitem(sys.modules, "basic.analysis.playground.server")
    for module in [module for module in sys.modules if module.partition(".")[0] == name]:
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(SystemExit) as caught:
        run_script(monkeypatch, "--runs", folder, "--port", 0)
    assert re.fullmatch(
        rf"error: {name}[\w.]* is not installed; use `pip install starlette anyio uvicorn`, or in a clone with uv's "
        r"environment `uv run --extra playground \.\.\.`",
        str(caught.value.code),
    )


def test_without_a_port_the_next_free_one_is_used_and_a_person_gets_a_browser(playground, folder, monkeypatch, capsys):
    served, opened = [], []
    monkeypatch.setattr("uvicorn.Server.run", lambda server, sockets: served.append(sockets[0]))
    monkeypatch.setattr("webbrowser.open", opened.append)
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        monkeypatch.setattr("basic.commands.show.playground.FIRST_PORT", port)
        run_script(monkeypatch, "--runs", folder)
        used = served[0].getsockname()[1]
        served[0].close()
    output = capsys.readouterr().out
    assert used > port
    assert f"port        {port} is taken, so {used} is used; --port chooses another" in output
    assert opened == []  # the output goes to no terminal
    monkeypatch.setattr("basic.commands.show.playground.has_person", lambda: True)
    run_script(monkeypatch, "--runs", folder, "--port", 0)
    assert opened == [f"http://127.0.0.1:{served[1].getsockname()[1]}/"]
    served[1].close()


def test_published_vocabularies_are_compared(playground, folder, tmp_path, monkeypatch, capsys):
    served = []
    monkeypatch.setattr("uvicorn.Server.run", lambda server, sockets: served.append(server.config.app))
    vocab = {byte: bytes([byte]) for byte in range(256)} | {256: b"12"}
    save_tiktoken(Tokenizer(vocab, [(b"1", b"2")], pattern="cl100k"), tmp_path / "cl100k_base.tiktoken")
    compare = ("--compare", tmp_path / "cl100k_base.tiktoken")
    run_script(monkeypatch, "--runs", folder, "--port", 0, *compare)
    assert "tokenizers  bytes, tiny, cl100k_base" in capsys.readouterr().out
    client = TestClient(served[0], base_url="http://127.0.0.1:8000")
    answer = client.post("/api/tokenize", json={"tokenizer": "cl100k_base", "text": "1212"}).json()
    assert answer["tokens"] == 3  # a pre-token of cl100k has at most three digits
    with pytest.raises(SystemExit, match=r"error: .*none\.tiktoken"):
        run_script(monkeypatch, "--runs", folder, "--port", 0, "--compare", "none.tiktoken")


def test_script_says_which_port_is_taken(playground, folder, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(SystemExit) as caught:
            run_script(monkeypatch, "--runs", folder, "--port", port)
    message = f"error: cannot listen on 127.0.0.1, port {port} \\(.*\\); choose another --host or --port \\(0: any free"
    assert re.match(message, str(caught.value.code))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--runs", "empty"], "error: empty has no tokenizer yet"),
        (["empty"], "error: empty is not a run"),
        (["--host", "256.0.0.1"], "error: "),
    ],
)
def test_script_errors_are_one_line(tmp_path, folder, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "runs").symlink_to(folder)
    with pytest.raises(SystemExit) as caught:
        run_script(monkeypatch, *arguments, "--port", 0)
    assert str(caught.value.code).startswith(message)
    assert "\n" not in str(caught.value.code)
