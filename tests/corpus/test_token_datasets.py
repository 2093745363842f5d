"""Token datasets of several files: their index, their damage, and reading them like one array."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from basic.common.errors import DamagedFileError, InvalidInputError
from basic.encoding import encode_files
from basic.tokens.opening import open_tokens
from tests.helpers.corpus_tools import END, encoded


@pytest.fixture
def dataset(tmp_path, corpus, tokenizer) -> tuple[Path, np.ndarray]:
    encode_files(tokenizer, corpus, tmp_path / "many", shard_bytes=700)
    return tmp_path / "many", encoded(tokenizer, corpus, tmp_path)


def test_incomplete_and_changed_files_are_detected(dataset, tokenizer, corpus):
    folder, tokens = dataset
    path = folder / "000003.bin"
    content = path.read_bytes()
    path.write_bytes(content[:-2])
    with pytest.raises(DamagedFileError, match=rf"000003.bin has {len(content) - 2} bytes, but .*index.json says"):
        open_tokens(folder)
    path.unlink()
    with pytest.raises(DamagedFileError, match=r"000003.bin is missing"):
        open_tokens(folder)
    path.write_bytes(bytes(len(content)))
    assert len(open_tokens(folder)) == len(tokens)
    with pytest.raises(DamagedFileError, match=r"000003.bin has the SHA-256 "):
        open_tokens(folder, verify=True)
    encode_files(tokenizer, corpus, folder, shard_bytes=700)
    assert np.array_equal(open_tokens(folder / "index.json", verify=True), tokens)


def test_files_that_are_not_an_index(tmp_path, dataset):
    folder, _ = dataset
    with pytest.raises(DamagedFileError, match="is not the index of a token dataset"):
        open_tokens(folder / "000000.json")
    with pytest.raises(InvalidInputError, match=r"dtype=uint32 was given, but .* says uint16"):
        open_tokens(folder, dtype=np.uint32)
    with pytest.raises(FileNotFoundError, match="the folder is not a token dataset"):
        open_tokens(tmp_path)


INDEX_DAMAGE = {
    "deep": lambda index: b'{"shards":' * 100_000,
    "a list": lambda index: [index],
    "no shards": lambda index: {**index, "shards": 5},
    "a shard that is no object": lambda index: {**index, "shards": [5]},
    "a shard without a file": lambda index: {**index, "shards": [{**index["shards"][0], "file": None}]},
    "a shard with a count of another kind": lambda index: {**index, "shards": [{**index["shards"][0], "count": True}]},
    "a negative count": lambda index: {
        **index,
        "count": 0,
        "shards": [{"file": "a", "count": 1, "sha256": ""}, {"file": "a", "count": -1, "sha256": ""}],
    },
    "another fingerprint": lambda index: {**index, "tokenizer_fingerprint": "0" * 64},
    "another order": lambda index: {**index, "shards": index["shards"][::-1]},
}


@pytest.mark.parametrize("damage", INDEX_DAMAGE.values(), ids=INDEX_DAMAGE)
def test_a_damaged_index_is_refused_in_one_line(dataset, tokenizer, corpus, damage):
    folder, tokens = dataset
    index = json.loads((folder / "index.json").read_bytes())
    content = damage(index)
    (folder / "index.json").write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    with pytest.raises(DamagedFileError, match=r"index\.json is not the index of a token dataset, or is damaged"):
        open_tokens(folder)
    encode_files(tokenizer, corpus, folder, shard_bytes=700)
    assert np.array_equal(open_tokens(folder, verify=True), tokens)


def test_several_files_are_read_like_one_array(dataset):
    folder, tokens = dataset
    many = open_tokens(folder)
    assert (len(many), many.ndim, many.dtype, many.shape) == (len(tokens), 1, tokens.dtype, tokens.shape)
    rng = np.random.default_rng(0)
    for _ in range(300):
        start, stop = rng.integers(-len(tokens) - 5, len(tokens) + 5, 2)
        step = rng.choice([1, 1, 2, -3])
        assert np.array_equal(many[start:stop:step], tokens[start:stop:step])
        shape = tuple(rng.integers(0, 9, rng.integers(0, 3)))
        indices = rng.integers(-len(tokens), len(tokens), shape)
        assert np.array_equal(many[indices], tokens[indices])
    assert (many[0], many[-1]) == (tokens[0], tokens[-1])
    assert np.array_equal(many[:], tokens)
    for wrong in (len(tokens), -len(tokens) - 1, np.array([0, len(tokens)])):
        with pytest.raises(IndexError, match="outside"):
            many[wrong]


def test_batches_are_those_of_the_single_file(dataset, tokenizer):
    from basic.training.batches import BatchSampler, check_token_ids, document_starts

    folder, tokens = dataset
    many, separator_id = open_tokens(folder), tokenizer.special_token_ids[END]
    starts = document_starts(tokens, separator_id, 64)
    assert np.array_equal(document_starts(many, separator_id, 64), starts)
    cases: list[dict[str, Any]] = [{}, {"starts": starts}, {"shuffled": True}]
    for options in cases:
        one, other = (BatchSampler(ids, 16, 64, seed=1, vocab_size=400, **options) for ids in (tokens, many))
        for step in range(4):
            for x, y in zip(one.batch(step), other.batch(step), strict=True):
                assert (x == y).all()
    with pytest.raises(ValueError, match=r"index.json has token ids up to"):
        check_token_ids(many, 100)
