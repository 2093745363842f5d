"""Ranks, merges in any order, whole tokens and missing bytes: the kernels give the ids of the plain path."""

import random

import pytest

from basic.common.errors import InvalidInputError
from basic.Tokenizer import Tokenizer
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
