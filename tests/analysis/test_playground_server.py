"""The playground's server: API, limits, connections and security headers; and its command."""

import base64
import hashlib
import json
import math
import re
import socket
import sys
import threading
from collections.abc import Generator
from contextlib import contextmanager

import anyio
import httpx2 as httpx
import pytest
import uvicorn
from starlette.testclient import TestClient

from basic.analysis.playground.answers import Playground
from basic.analysis.playground.server import MAX_SHORT_BYTES, MAX_TEXT_CHARACTERS, TimedProtocol, create_app
from basic.formats.tokenizers import save_tiktoken
from basic.generation.text import complete
from basic.Tokenizer import Tokenizer
from tests.helpers.playground_tools import CONTEXT, END, SETTINGS, make_playground, the_run
from tests.helpers.scripts import run_script
from tests.helpers.tokenizer_tools import BYTES

# --- The server -----------------------------------------------------------------------------------------------


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
        ("generate", SETTINGS | {"max_new_tokens": 1.5}, "max_new_tokens must be an integer from 1 to 1,000, got 1.5"),
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
    slow = Tokenizer(BYTES, [], pattern="(?:a|aa)+b|.")
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


def test_script_listens_on_localhost_by_default(playground, folder, monkeypatch, capsys):
    served = []
    monkeypatch.setattr("uvicorn.Server.run", lambda server, sockets: served.append((server.config.app, sockets[0])))
    run_script(monkeypatch, "playground", "--runs", folder, "--port", 0)
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
        run_script(monkeypatch, "playground", "--runs", folder, "--port", 0)
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
        run_script(monkeypatch, "playground", "--runs", folder)
        used = served[0].getsockname()[1]
        served[0].close()
    output = capsys.readouterr().out
    assert used > port
    assert f"port        {port} is taken, so {used} is used; --port chooses another" in output
    assert opened == []  # the output goes to no terminal
    monkeypatch.setattr("basic.commands.show.playground.has_person", lambda: True)
    run_script(monkeypatch, "playground", "--runs", folder, "--port", 0)
    assert opened == [f"http://127.0.0.1:{served[1].getsockname()[1]}/"]
    served[1].close()


def test_published_vocabularies_are_compared(playground, folder, tmp_path, monkeypatch, capsys):
    served = []
    monkeypatch.setattr("uvicorn.Server.run", lambda server, sockets: served.append(server.config.app))
    vocab = BYTES | {256: b"12"}
    save_tiktoken(Tokenizer(vocab, [(b"1", b"2")], pattern="cl100k"), tmp_path / "cl100k_base.tiktoken")
    compare = ("--compare", tmp_path / "cl100k_base.tiktoken")
    run_script(monkeypatch, "playground", "--runs", folder, "--port", 0, *compare)
    assert "tokenizers  bytes, tiny, cl100k_base" in capsys.readouterr().out
    client = TestClient(served[0], base_url="http://127.0.0.1:8000")
    answer = client.post("/api/tokenize", json={"tokenizer": "cl100k_base", "text": "1212"}).json()
    assert answer["tokens"] == 3  # a pre-token of cl100k has at most three digits
    with pytest.raises(SystemExit, match=r"error: .*none\.tiktoken"):
        run_script(monkeypatch, "playground", "--runs", folder, "--port", 0, "--compare", "none.tiktoken")


def test_script_says_which_port_is_taken(playground, folder, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(SystemExit) as caught:
            run_script(monkeypatch, "playground", "--runs", folder, "--port", port)
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
        run_script(monkeypatch, "playground", *arguments, "--port", 0)
    assert str(caught.value.code).startswith(message)
    assert "\n" not in str(caught.value.code)
