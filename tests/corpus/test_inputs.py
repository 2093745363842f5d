"""Inputs of a corpus: shards, globs, URLs and web servers."""

import os
import sys
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest

from basic.commands.own_text import train_text
from basic.common.errors import InvalidInputError
from basic.corpus.counting import count_pretokens
from basic.corpus.shards import entire_source, split_into_shards
from basic.corpus.sources import TextSource, expand_inputs
from basic.encoding import encode_files
from basic.Tokenizer import Tokenizer
from basic.tokens.opening import open_tokens
from basic.train_bpe import train_bpe
from tests.helpers.corpus_tools import END, SPECIAL, encoded


def test_shards_are_bounded_and_small_inputs_share_one(tmp_path):
    for name, size in (("a", 10), ("b", 25), ("c", 3), ("d", 4), ("e.txt.gz", 90)):
        (tmp_path / name).write_bytes(b"x" * size)
    sources = expand_inputs([tmp_path / name for name in ("a", "b", "c", "d", "e.txt.gz", "a")])
    shards = split_into_shards(map(entire_source, sources), 10)
    sizes = [[segment.num_bytes for segment in shard] for shard in shards]
    assert sizes == [[10], [10], [10], [5, 3], [4], [90], [10]]


def test_globs_are_sorted_and_an_empty_one_is_an_error(tmp_path, monkeypatch):
    for name in ("b.txt", "a.txt", "c[1].txt", "deep/d.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    monkeypatch.chdir(tmp_path)

    def names(*inputs):
        return [os.fspath(source) for source in expand_inputs(inputs)]

    assert names("*.txt", "a.txt") == ["a.txt", "b.txt", "c[1].txt", "a.txt"]
    assert names("c[1].txt") == ["c[1].txt"]
    assert names("**/*.txt")[-1] == "deep/d.txt"
    with_field = expand_inputs(TextSource("[ab].txt", field="body"))
    assert [(source.path, source.field) for source in with_field] == [("a.txt", "body"), ("b.txt", "body")]
    with pytest.raises(FileNotFoundError, match=r"no file matches 'x\*\.txt'"):
        count_pretokens("x*.txt", SPECIAL)
    with pytest.raises(InvalidInputError, match="there is no input"):
        count_pretokens([], SPECIAL)


@pytest.mark.parametrize(
    "take", [train_text, lambda text: train_bpe(text, 300, [END])], ids=["train_text", "train_bpe"]
)
def test_a_text_that_is_given_as_a_path_is_not_printed_as_a_whole(take):
    with pytest.raises(InvalidInputError, match=r"too long for a path.*save a text to a file") as error:
        take("Who is it? [A text]\n" * 5000)
    assert len(str(error.value)) < 400


def test_urls_are_read_like_files(tmp_path, monkeypatch, corpus, tokenizer):
    import fsspec

    memory = fsspec.filesystem("memory")
    for path in set(corpus):
        memory.pipe_file(f"/corpus/{path.name}", path.read_bytes())
    monkeypatch.setattr("basic.corpus.sources.REMOTE_BLOCK_BYTES", 500)
    urls = [TextSource(f"memory://corpus/{path.name}") for path in corpus]
    expected = encoded(tokenizer, corpus, tmp_path)
    for kernels in (False, True):
        counts = count_pretokens(urls, SPECIAL, shard_bytes=1000, kernels=kernels, num_workers=2)
        assert counts == count_pretokens(corpus, SPECIAL, kernels=False)
        fast = Tokenizer(tokenizer.vocab, tokenizer.merges, [END], kernels=kernels)
        folder = tmp_path / f"remote{kernels}"
        encode_files(fast, urls, folder, shard_bytes=1000, num_workers=1)
        assert np.array_equal(open_tokens(folder), expected)
    assert [os.fspath(source) for source in expand_inputs("memory://corpus/*.txt")] == [
        *("memory:///corpus/empty.txt", "memory:///corpus/plain.txt")
    ]
    (local,) = expand_inputs(corpus[0].as_uri())
    assert local.size_and_version()[0] == corpus[0].stat().st_size
    with pytest.raises(FileNotFoundError, match=r"there is no file 'memory://corpus/none\.txt'"):
        count_pretokens("memory://corpus/none.txt", SPECIAL)
    with pytest.raises(FileNotFoundError, match=r"no file matches"):
        count_pretokens("memory://corpus/none*.txt", SPECIAL)
    with pytest.raises(InvalidInputError, match="'nonsense://x' is a URL that cannot be opened here"):
        count_pretokens("nonsense://x", SPECIAL)
    memory.pipe_file("/corpus/wrong.txt", b"word " * 500 + b"\xff")
    with pytest.raises(ValueError, match=r"wrong\.txt' is not valid UTF-8 at byte offset 2500 "):
        count_pretokens("memory://corpus/wrong.txt", SPECIAL, shard_bytes=300, kernels=False)
    monkeypatch.setitem(sys.modules, "fsspec.core", None)
    monkeypatch.setitem(sys.modules, "fsspec", None)
    with pytest.raises(
        InvalidInputError, match="needs fsspec, which is not installed; use `pip install fsspec aiohttp`"
    ):
        count_pretokens("memory://corpus/plain.txt", SPECIAL)


class _Handler(SimpleHTTPRequestHandler):
    """Python's server, which always sends the complete file, or a server that sends the requested range."""

    supports_ranges = False

    def do_GET(self):
        requested = self.headers.get("Range") if self.supports_ranges else None
        if requested is None:
            return super().do_GET()
        content = Path(self.translate_path(self.path)).read_bytes()
        first, last = map(int, requested.removeprefix("bytes=").split("-"))
        body = content[first : last + 1]
        self.send_response(206)
        self.send_header("Content-Range", f"bytes {first}-{first + len(body) - 1}/{len(content)}")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format, *args):
        pass


@pytest.mark.parametrize("supports_ranges", [False, True])
def test_web_servers_with_and_without_ranges(tmp_path, monkeypatch, corpus, tokenizer, supports_ranges):
    monkeypatch.setattr("basic.corpus.sources.REMOTE_BLOCK_BYTES", 500)
    handler = type("Handler", (_Handler,), {"supports_ranges": supports_ranges})
    served = [path for path in corpus if path.stat().st_size]
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(handler, directory=corpus[0].parent)) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        try:
            base = f"http://127.0.0.1:{server.server_port}"
            urls = [TextSource(f"{base}/{path.name}") for path in served]
            assert [source.supports_ranges() for source in urls] == [supports_ranges] * len(urls)
            sizes, versions = zip(*(source.size_and_version() for source in urls), strict=True)
            assert list(sizes) == [path.stat().st_size for path in served]
            os.utime(served[0], (1, 1))
            changed = [source.size_and_version()[1] != old for source, old in zip(urls, versions, strict=True)]
            assert changed == [path == served[0] for path in served]
            counts = count_pretokens(urls, SPECIAL, shard_bytes=1000, kernels=False, num_workers=2)
            assert counts == count_pretokens(served, SPECIAL, kernels=False)
            encode_files(tokenizer, urls, tmp_path / "remote", shard_bytes=1000, num_workers=1)
            assert np.array_equal(open_tokens(tmp_path / "remote"), encoded(tokenizer, served, tmp_path))
            with pytest.raises(FileNotFoundError, match=r"there is no file 'http://.*/none\.txt'"):
                count_pretokens(f"{base}/none.txt", SPECIAL)
        finally:
            server.shutdown()
