"""The playground's answers and its server: what it shows is true, and nobody else gets at it."""

import json
import math
import os
import runpy
from pathlib import Path

import anyio
import pytest
import torch
from starlette.testclient import TestClient

from basic.analysis import playground_server
from basic.analysis.playground import LIKELIEST, SHOWN_TOKENS, Playground, find_tokenizers, newest_run
from basic.analysis.playground_server import MAX_TEXT_CHARACTERS, create_app
from basic.generation.text import complete
from basic.model import ModelConfig, TransformerLM
from basic.Tokenizer import Tokenizer
from basic.training.run_folder import Run
from basic.training.settings import RunConfig, TrainConfig

END = "<|endoftext|>"
MERGES = [(b"t", b"h"), (b"th", b"e"), (b" ", b"the")]
CONTEXT = 12


def make_playground(folder: Path, special_tokens: tuple[str, ...] = (END,)) -> Playground:
    """A folder of runs, one with an untrained model whose output layer is a little wild, and a tokenizer by itself."""
    tokens = [bytes([i]) for i in range(256)] + [left + right for left, right in MERGES]
    Tokenizer(dict(enumerate(tokens)), MERGES, special_tokens, kernels=False).save(folder / "tiny" / "tokenizer")
    Tokenizer(dict(enumerate(tokens[:256])), [], kernels=False).save(folder / "bytes")
    (folder / "notes.txt").write_text("nothing")
    torch.manual_seed(0)
    # Room for more ids than the tokenizer has, which must never come up.
    shape = ModelConfig(vocab_size=300, context_length=CONTEXT, d_model=16, num_layers=1, num_heads=2)
    model = TransformerLM(shape).eval()
    with torch.no_grad():
        model.lm_head.weight.mul_(6)
    run = Run(model, RunConfig(model=shape, train=TrainConfig(steps=1)), folder / "tiny" / "tokenizer", 7)
    return Playground(folder, run, "tiny")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def playground(folder) -> Playground:
    return make_playground(folder)


@pytest.fixture(scope="module")
def client(playground) -> TestClient:
    return TestClient(create_app(playground), base_url="http://127.0.0.1:8000")


# --- Answers ----------------------------------------------------------------------------------------------------


def test_what_is_at_hand_is_found(tmp_path):
    playground = make_playground(tmp_path)
    assert {name: path.name for name, path in find_tokenizers(tmp_path).items()} == {
        "tiny": "tokenizer",
        "bytes": "bytes",
    }
    assert find_tokenizers(tmp_path / "missing") == {}
    about = playground.about()
    assert about["tokenizers"] == ["tiny", "bytes"]
    assert (about["model"]["name"], about["model"]["context_length"], about["model"]["vocab_size"]) == ("tiny", 12, 260)
    assert newest_run(tmp_path) is None
    for name in ("old", "new"):
        (tmp_path / name / "checkpoints").mkdir(parents=True)
        (tmp_path / name / "tokenizer").mkdir()
        (tmp_path / name / "checkpoints" / "step_00000001.safetensors").touch()
    os.utime(tmp_path / "old" / "checkpoints" / "step_00000001.safetensors", (1, 1))
    assert newest_run(tmp_path) == tmp_path / "new"


@pytest.mark.parametrize(
    "text", ["", "the theme", f"a{END}{END} b", "é\u0301\u202e\0\r\n\t", "\ud83e\udd39 \ud800 the"]
)
@pytest.mark.parametrize("name", ["tiny", "bytes"])
def test_tokens_are_the_tokenizers(folder, playground, name, text):
    tokenizer = Tokenizer.load(find_tokenizers(folder)[name])
    ids = tokenizer.encode(text)
    answer = playground.tokenize(name, text)
    assert answer["ids"] == ids
    assert [bytes.fromhex(piece) for piece in answer["pieces"]] == [tokenizer.vocab[i] for i in ids]
    assert [ids[place] for place in answer["special"]] == [i for i in ids if i in tokenizer.special_token_ids.values()]
    data = tokenizer.decode_bytes(ids)
    assert (answer["tokens"], answer["bytes"], answer["distinct"]) == (len(ids), len(data), len(set(ids)))


def test_of_a_long_text_the_first_tokens_are_sent_and_all_are_counted(playground):
    answer = playground.tokenize("tiny", " the" * 10_000)
    assert answer["tokens"] == 10_000
    assert answer["bytes"] == 40_000
    assert answer["ids"] == [258] * SHOWN_TOKENS


def test_a_tokenizer_that_was_trained_anew_is_read_anew(tmp_path):
    playground = make_playground(tmp_path)
    assert playground.tokenize("bytes", " the")["tokens"] == 4
    Tokenizer({i: bytes([i]) for i in range(256)} | {256: b"th"}, [(b"t", b"h")], kernels=False).save(
        tmp_path / "bytes"
    )
    assert playground.tokenize("bytes", " the")["tokens"] == 3


def judged_by_hand(playground, row, place):
    """The distribution of the token at a place of a row of ids, from the row's part before it alone."""
    with torch.no_grad():
        logits = playground._run.model(torch.tensor([row[:place]]))[0, -1, :260].double()
    return torch.exp(logits - logits.logsumexp(0))


@pytest.mark.parametrize(
    ("text", "keep_end"), [("", False), ("the then", False), ("a the b the c the d the e", False), ("x the " * 9, True)]
)
def test_each_token_is_judged_by_what_stands_before_it(playground, text, keep_end):
    end_id, ids = 259, Tokenizer.load(playground._run.tokenizer_path).encode(text)
    answer = playground.score(text, keep_end=keep_end)
    cut = keep_end and len(ids) > CONTEXT
    row = ids[-CONTEXT - 1 :] if cut else [end_id, *ids][: CONTEXT + 1]
    seen = row if cut else row[1:]
    assert (answer["tokens"], answer["ids"], answer["first"]) == (len(ids), seen, len(ids) - len(seen) if cut else 0)
    nats, ranks, likeliest = [], [], []
    for place in range(1, min(len(row), CONTEXT) + 1):
        p = judged_by_hand(playground, row, place)
        likeliest.append(p.argsort(descending=True)[:LIKELIEST].tolist())
        if place < len(row):
            nats.append(-math.log(p[row[place]]))
            ranks.append(1 + int((p > p[row[place]]).sum()))
        found = answer["likeliest"][place - 1 + cut]
        assert [q for _, q in found] == pytest.approx(p.sort(descending=True).values[:LIKELIEST].tolist(), rel=1e-3)
    blind = [None] if cut else []
    assert answer["ranks"] == blind + ranks
    assert answer["nats"][cut:] == pytest.approx(nats, rel=1e-3)
    assert [[i for i, _ in found] for found in answer["likeliest"][cut:]] == likeliest
    assert {int(i) for i in answer["names"]} == {i for found in likeliest for i in found}
    if nats:
        assert answer["mean_nats"] == pytest.approx(sum(nats) / len(nats))
        num_bytes = sum(len(bytes.fromhex(piece)) for piece in answer["pieces"][cut:])
        assert answer["bits_per_byte"] == pytest.approx(sum(nats) / math.log(2) / num_bytes)
    else:
        assert answer["mean_nats"] is answer["bits_per_byte"] is None


def test_without_an_end_of_text_token_nothing_is_known_of_the_first_token(tmp_path):
    answer = make_playground(tmp_path, ()).score("the a")
    assert answer["nats"][0] is answer["ranks"][0] is answer["likeliest"][0] is None
    assert len(answer["nats"]) == len(answer["ids"]) == 3
    assert len(answer["likeliest"]) == 4
    assert make_playground(tmp_path, ()).score("")["likeliest"] == []


def test_a_tokenizer_alone_says_that_there_is_no_model(tmp_path):
    make_playground(tmp_path)
    client = TestClient(create_app(Playground(tmp_path)), base_url="http://localhost:1")
    assert client.get("/api/about").json()["model"] is None
    answer = client.post("/api/score", json={"text": "a"})
    assert (answer.status_code, "start the playground with a run" in answer.json()["error"]) == (400, True)


# --- The server -------------------------------------------------------------------------------------------------

SETTINGS = {"prompt": "the", "max_new_tokens": 6, "temperature": 1.0, "top_p": 0.9, "seed": 3}


@pytest.mark.parametrize("prompt", ["the", "", "the " * 40])
def test_a_continuation_comes_in_lines(client, playground, prompt):
    tokenizer = Tokenizer.load(playground._run.tokenizer_path)
    response = client.post("/api/generate", json=SETTINGS | {"prompt": prompt})
    first, *pieces, last = map(json.loads, response.text.splitlines())
    num_tokens = len(tokenizer.encode(prompt))
    assert first == {"tokens": num_tokens, "seen": min(num_tokens, CONTEXT)}
    assert last == {"done": True}
    expected = complete(playground._run.model, tokenizer, [prompt or END], 6, top_p=0.9, seed=3)
    assert ["".join(piece["text"] for piece in pieces)] == expected
    assert len(pieces) > 1


def test_when_the_client_leaves_the_model_stops_and_the_next_one_has_its_turn(playground, monkeypatch):
    made = []

    def endless(*arguments, **options):
        while True:
            made.append("x")
            yield {"text": "x"}

    monkeypatch.setattr(playground, "generate", endless)
    app = create_app(playground)
    scope = {
        **{"type": "http", "asgi": {"version": "3.0", "spec_version": "2.3"}, "http_version": "1.1"},
        **{"method": "POST", "scheme": "http", "path": "/api/generate", "raw_path": b"/api/generate", "root_path": ""},
        **{"query_string": b"", "client": ("127.0.0.1", 1), "server": ("127.0.0.1", 8000)},
        "headers": [(b"host", b"127.0.0.1:8000"), (b"content-type", b"application/json")],
    }

    async def listen(num_lines: int) -> None:
        """Ask, read so many lines, and go."""
        enough = anyio.Event()
        left = num_lines
        question = [{"type": "http.request", "body": json.dumps(SETTINGS).encode(), "more_body": False}]

        async def receive():
            if question:
                return question.pop()
            await enough.wait()
            return {"type": "http.disconnect"}

        async def send(message):
            nonlocal left
            left -= message["type"] == "http.response.body"
            if left == 0:
                enough.set()
            await anyio.sleep(0)

        await app(scope, receive, send)

    async def twice() -> None:
        with anyio.fail_after(30):
            await listen(5)
            await listen(3)

    anyio.run(twice)
    assert 8 <= len(made) < 100


@pytest.mark.parametrize("name", ["../tiny/tokenizer", "tiny/tokenizer", "..", "/etc", "notes.txt", "", "GPT-2"])
def test_a_request_names_what_is_listed_and_nothing_else(client, name, folder):
    answer = client.post("/api/tokenize", json={"tokenizer": name, "text": "x"})
    assert answer.status_code == 404
    assert "no tokenizer" in answer.json()["error"]
    assert str(folder) not in answer.text


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 200),
        ({"host": "localhost:8000", "origin": "http://localhost:8000", "sec-fetch-site": "same-origin"}, 200),
        ({"host": "192.168.0.7:8000"}, 200),  # where it was told to listen there; no name can be pointed elsewhere
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
def test_strangers_are_refused(client, headers, status):
    content = json.dumps({"tokenizer": "tiny", "text": "the"})
    answer = client.post("/api/tokenize", content=content, headers={"content-type": "application/json"} | headers)
    assert answer.status_code == status
    assert ("error" in answer.json()) == (status != 200)
    if "host" in headers:
        assert client.get("/", headers=headers).status_code == (200 if status == 200 else 403)


def test_a_name_that_it_listens_on_may_be_asked_for(playground):
    client = TestClient(create_app(playground, host="lab.example"), base_url="http://LAB.example:8000")
    assert client.get("/api/about").status_code == 200


@pytest.mark.parametrize(
    ("path", "question", "message"),
    [
        ("tokenize", "{", "the question is not JSON"),
        ("tokenize", "[" * 100_000, "the question is not JSON"),
        ("tokenize", "[]", "the question must be a JSON object"),
        ("tokenize", {"tokenizer": "tiny"}, "text must be a text, got None"),
        ("tokenize", {"tokenizer": 3, "text": ""}, "tokenizer must be a text, got 3"),
        ("score", {"text": ["a"]}, "text must be a text, got ['a']"),
        ("score", {"text": "", "keep_end": 1}, "keep_end must be true or false, got 1"),
        ("generate", SETTINGS | {"max_new_tokens": 0}, "max_new_tokens must be a whole number from 1 to 1,000, got 0"),
        (
            "generate",
            SETTINGS | {"max_new_tokens": 1.5},
            "max_new_tokens must be a whole number from 1 to 1,000, got 1.5",
        ),
        ("generate", SETTINGS | {"temperature": -1}, "temperature must be a number from 0 to 10, got -1"),
        ("generate", SETTINGS | {"temperature": True}, "temperature must be a number from 0 to 10, got True"),
        (
            "generate",
            json.dumps(SETTINGS | {"temperature": math.nan}),
            "temperature must be a number from 0 to 10, got nan",
        ),
        ("generate", SETTINGS | {"top_p": 0}, "top_p must be a number from 1e-06 to 1, got 0"),
        ("generate", SETTINGS | {"seed": -1}, "seed must be a whole number from 0 to"),
    ],
)
def test_wrong_questions_are_answered_with_what_is_wrong(client, path, question, message):
    content = question if isinstance(question, str) else json.dumps(question)
    answer = client.post(f"/api/{path}", content=content, headers={"content-type": "application/json"})
    assert answer.status_code == 400
    assert answer.json()["error"].startswith(message)


def test_too_much_is_refused(client, monkeypatch):
    monkeypatch.setattr(playground_server, "MAX_BODY_BYTES", 1000)
    monkeypatch.setattr(playground_server, "MAX_TEXT_CHARACTERS", 500)
    assert client.post("/api/score", json={"text": "a" * 501}).json() == {
        "error": "text has 501 characters; at most 500 are allowed"
    }
    answer = client.post("/api/score", json={"text": "a" * 1001})
    assert (answer.status_code, "too long" in answer.json()["error"]) == (413, True)
    assert MAX_TEXT_CHARACTERS >= 5_000_000


def test_other_paths_and_methods_are_errors_in_json(client):
    for path in ("/api/nothing", "/playground.py", "/..%2fREADME.md"):
        assert (client.get(path).status_code, client.get(path).json()) == (404, {"error": "Not Found"})
    assert client.get("/api/score").status_code == 405


def test_the_page_takes_nothing_from_elsewhere(client):
    answer = client.get("/")
    policy = dict(part.split(" ", 1) for part in answer.headers["content-security-policy"].split("; "))
    assert policy["default-src"] == "'none'"
    assert policy["connect-src"] == "'self'"
    assert policy["script-src"].count("'sha256-") == policy["style-src"].count("'sha256-") == 1
    assert "unsafe" not in answer.headers["content-security-policy"]
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


# --- The script -------------------------------------------------------------------------------------------------


def run_script(monkeypatch, *arguments: object) -> None:
    path = Path(__file__).resolve().parents[2] / "local" / "playground.py"
    monkeypatch.setattr("sys.argv", [str(path), *map(str, arguments)])
    runpy.run_path(str(path), run_name="__main__")


def test_the_script_serves_on_this_machine_alone_unless_told_otherwise(folder, monkeypatch, capsys):
    served = []
    monkeypatch.setattr("uvicorn.Server.run", lambda server, sockets: served.append((server.config.app, sockets[0])))
    missing = ("--gpt2-vocab", folder / "none.json")
    run_script(monkeypatch, "--runs", folder, "--port", 0, *missing)
    ((app, listener),) = served
    host, port = listener.getsockname()
    listener.close()
    assert host == "127.0.0.1"
    said = capsys.readouterr().out
    assert f"open        http://127.0.0.1:{port}/" in said
    assert "tokenizers  bytes, tiny\nmodel       none yet" in said
    client = TestClient(app, base_url=f"http://127.0.0.1:{port}")
    assert client.get("/api/about").json()["tokenizers"] == ["bytes", "tiny"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--runs", "empty"], "error: empty has no tokenizer yet"),
        (["empty"], "error: empty is not a run"),
        (["--host", "256.0.0.1"], "error: "),
    ],
)
def test_the_script_fails_in_one_line(tmp_path, folder, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "runs").symlink_to(folder)
    with pytest.raises(SystemExit) as caught:
        run_script(monkeypatch, *arguments, "--gpt2-vocab", "none.json", "--port", 0)
    assert str(caught.value.code).startswith(message)
    assert "\n" not in str(caught.value.code)
