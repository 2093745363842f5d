"""Ranks, merges in any order, whole tokens and missing bytes: the kernels give the ids of the plain path."""

import base64
import random

import pytest

from basic.bpe.kernels.merges import merge_arrays
from basic.common.errors import InvalidInputError
from basic.Tokenizer import Tokenizer
from basic.tokenizer_files import rank_file
from basic.tokenizer_files.content import TokenizerSettings
from basic.tokenizer_files.equivalent_merges import used_merges
from tests.helpers.tokenizer_tools import BYTES


def random_vocabulary(random_: random.Random) -> dict[int, bytes]:
    """Bytes and tokens of a, b and c, some longer than a key of the hash table, in a good order or in any."""
    tokens = [b"a", b"b", b"c"]
    for _ in range(random_.randint(1, 14)):
        tokens.append(random_.choice(tokens) + random_.choice(tokens))
    tokens = [token for token in dict.fromkeys(tokens[3:]) if len(token) < 600]
    single = list(BYTES.values())
    if random_.random() < 0.5:
        random_.shuffle(tokens)
        random_.shuffle(single)
    return dict(enumerate([*single, *tokens]))


@pytest.mark.parametrize("as_merges", [False, True])
def test_any_vocabulary_of_ranks(as_merges):
    random_ = random.Random(as_merges)
    for _ in range(25):
        vocab = random_vocabulary(random_)
        plain = fast = Tokenizer(vocab, None, kernels=False)
        if as_merges:  # of any order, several for a token
            known = [token for token in vocab.values() if len(token) > 1 or token in b"abc"]
            merges = [(x, y) for x in known for y in known if x + y in known]
            random_.shuffle(merges)
            settings = TokenizerSettings(ignore_merges=random_.random() < 0.5, one_merge_at_a_time=True)
            plain = Tokenizer(vocab, merges, kernels=False, settings=settings)
            fast = Tokenizer(vocab, merges, kernels=True, settings=settings)
        else:
            fast = Tokenizer(vocab, None, kernels=True)
        assert fast.used_merges == plain.used_merges == used_merges(fast._rules, vocab)
        for _ in range(8):
            letters = random_.choices(["a", "b", "c", " ", "ab", "abc"], k=random_.randint(1, 60))
            text = "".join(letters) * random_.choice([1, 1, 20])
            assert fast.encode_array(text).tolist() == fast.encode(text) == plain.encode(text)


def test_tokens_of_all_lengths_are_whole():
    """Around the sizes of a key, of a step, and of the longest pre-token that is kept."""
    lengths = [2, 7, 8, 9, 15, 16, 17, 23, 24, 31, 32, 33, 254, 255, 256, 257, 400]
    tokens = [bytes([97 + i % 7 for i in range(length)]) for length in lengths]
    ours = Tokenizer({**BYTES, **dict(enumerate(tokens, 256))}, None, kernels=True)
    for i, token in enumerate(tokens, 256):
        text = token.decode()
        assert ours.encode_array(text).tolist() == [i]
        others = [text[:-1] + "x", "x" + text[1:], text + "x", f"{text} {text}"]
        plain = Tokenizer(ours.vocab, None, kernels=False)
        for other in others:
            assert ours.encode_array(other).tolist() == plain.encode(other)


def test_a_whole_token_may_have_bytes_without_tokens():
    vocab = {i: token for i, token in BYTES.items() if token != b"!"} | {300: b"!?", 301: b"long" * 70 + b"!"}
    for kernels in (True, False):
        ours = Tokenizer(vocab, None, pattern=r"\s|\S+", kernels=kernels)
        assert ours.encode_array("a !?\n" + "long" * 70 + "!").tolist() == [97, 32, 300, 10, 301]
        with pytest.raises(InvalidInputError, match="no token for the byte 0x21, at byte offset 4 of"):
            ours.encode_array("!? a!")
        assert ours.encode_array("!?").tolist() == [300]


def test_what_is_kept_of_a_rank_file(tmp_path, monkeypatch):
    """A rank file is parsed, and the merges of its ranks are found, once; damage to what is kept has no effect."""
    random_ = random.Random(5)
    vocab = {**BYTES, **dict(enumerate({bytes(random_.choices(b"abc", k=9)) for _ in range(500)}, 300)), 256: b"ab"}
    lines = [b"%s %d\n" % (base64.b64encode(token), rank) for rank, token in vocab.items()]
    (tmp_path / "x.tiktoken").write_bytes(b"".join(lines))
    (tmp_path / "kept").mkdir()
    for module in (rank_file, merge_arrays):
        monkeypatch.setattr(module, "cache_folder", lambda: tmp_path / "kept")
    monkeypatch.setattr(rank_file, "_MIN_KEPT_BYTES", 0)
    monkeypatch.setattr(merge_arrays, "_MIN_KEPT_TOKENS", 0)

    def ids() -> list[int]:
        tokenizer = Tokenizer.load(tmp_path / "x.tiktoken", pattern="gpt2")
        tokenizer.kernels = True
        assert tokenizer.vocab == vocab
        return tokenizer.encode("abacab " + "".join(random.Random(6).choices("abc", k=3000)))

    expected = ids()
    paths = list((tmp_path / "kept").iterdir())
    assert {path.name.split(".")[0] for path in paths} == {"ranks", "joins"}
    with monkeypatch.context() as patch:
        patch.setattr(rank_file, "_parse", lambda *_: pytest.fail("it is parsed again"))
        patch.setattr(merge_arrays, "last_joins", lambda *_: pytest.fail("they are found again"))
        assert ids() == expected
    for path in paths:
        data = path.read_bytes()
        path.write_bytes(data[:-9] + b"x" * 9)
        assert ids() == expected
        assert path.read_bytes() == data, "it is written again"
