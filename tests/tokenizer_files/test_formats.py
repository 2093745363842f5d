"""tokenizer.json and rank files, compared with the packages `tokenizers` and tiktoken."""

import base64
import itertools
import json
import random
from functools import cache

import pytest
import tiktoken
import tokenizers
from hypothesis import given

from basic.bytes_utils import load_merges, load_vocab
from basic.formats.tokenizers import load_tiktoken, save_tiktoken, save_tokenizer_json
from basic.pretokenization import resolve_pattern
from basic.Tokenizer import Tokenizer
from basic.train_bpe import train_bpe
from tests.conftest import shared_data
from tests.fixtures.make_tokenizer_fixtures import SAMPLE
from tests.helpers.tokenizer_tools import (
    ANY_TEXT,
    BYTES,
    END,
    OTHER,
    PUBLISHED,
    SPECIAL_TOKENS,
    TEXT_FILES,
    tiktoken_of_file,
    tokenizer_json,
)

pytestmark = pytest.mark.usefixtures("plain_path")


@cache
def trained(pattern: str) -> Tokenizer:
    return Tokenizer(*train_bpe(SAMPLE, 500, SPECIAL_TOKENS, pattern=pattern), SPECIAL_TOKENS, pattern=pattern)


@pytest.fixture(scope="module")
def programs_for(tmp_path_factory):
    """For a pattern: the other two programs with a tokenizer's files, and the tokenizers read back from these."""

    @cache
    def make(pattern: str):
        folder, tokenizer = tmp_path_factory.mktemp("formats"), trained(pattern)
        json_path, ranks_path = folder / "tokenizer.json", folder / "ranks.tiktoken"
        save_tokenizer_json(tokenizer, json_path)
        save_tiktoken(tokenizer, ranks_path)
        special = tokenizer.special_token_ids
        loaded = Tokenizer.load(json_path), load_tiktoken(ranks_path, pattern=pattern, special_tokens=special)
        assert [ours.fingerprint for ours in loaded] == [tokenizer.fingerprint] * 2
        theirs = tokenizers.Tokenizer.from_file(str(json_path))
        encoding = tiktoken_of_file(ranks_path, special, PUBLISHED[pattern])
        assert theirs.get_vocab_size() == encoding.n_vocab == tokenizer.vocab_size
        return (theirs, encoding), loaded

    return make


def assert_same_ids(programs_for, pattern: str, text: str) -> None:
    (huggingface, encoding), loaded = programs_for(pattern)
    ids = trained(pattern).encode(text)
    assert huggingface.encode(text).ids == ids
    assert encoding.encode(text, allowed_special="all") == ids
    assert [ours.encode(text) for ours in loaded] == [ids, ids]
    assert huggingface.decode(ids, skip_special_tokens=False) == text


# ---- the same ids, and back


@pytest.mark.parametrize("pattern", PUBLISHED)
@given(text=ANY_TEXT)
def test_any_text_has_the_same_ids_everywhere(programs_for, pattern, text):
    assert_same_ids(programs_for, pattern, text)


@pytest.mark.parametrize("pattern", PUBLISHED)
def test_real_text_has_the_same_ids_everywhere(programs_for, pattern):
    for name in TEXT_FILES:
        text = shared_data(name).read_bytes()
        texts = json.loads(text) if name.endswith(".json") else [text[:6000].decode(errors="ignore")]
        for one_text in [*texts, END.join(texts)]:
            assert_same_ids(programs_for, pattern, one_text)


def test_gpt2_survives_a_round_trip(tmp_path):
    """With its first ten thousand merges; all of them would take long."""
    vocab, merges = load_vocab(shared_data("gpt2_vocab.json")), load_merges(shared_data("gpt2_merges.txt"))[:10_000]
    gpt2 = Tokenizer({i: token for i, token in vocab.items() if i < 10_256}, merges, [END])
    save_tokenizer_json(gpt2, tmp_path / "tokenizer.json")
    huggingface = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    huggingface.save(str(tmp_path / "theirs.json"))
    assert Tokenizer.load(tmp_path / "theirs.json").fingerprint == gpt2.fingerprint
    save_tiktoken(gpt2, tmp_path / "gpt2.tiktoken")
    loaded = load_tiktoken(tmp_path / "gpt2.tiktoken", pattern=PUBLISHED["gpt2"], special_tokens=[END])
    assert loaded.fingerprint == gpt2.fingerprint
    text = shared_data("naughty_strings.json").read_text(encoding="utf-8")
    encoding = tiktoken_of_file(tmp_path / "gpt2.tiktoken", {END: 10_256}, PUBLISHED["gpt2"])
    assert gpt2.encode(text) == encoding.encode(text) == huggingface.encode(text).ids


@pytest.mark.parametrize("pattern", [name for name in PUBLISHED if name != OTHER])
def test_a_named_pattern_is_equivalent_to_the_published_one(pattern):
    ours, published = resolve_pattern(pattern), resolve_pattern(PUBLISHED[pattern])
    assert published.name == ours.name == pattern
    split = tokenizers.pre_tokenizers.Split(tokenizers.Regex(ours.splits[0]), "isolated")
    # tiktoken does not split a pre-token that is a token.
    short = ["".join(letters) for n in range(1, 5) for letters in itertools.product("a'S1 \n!", repeat=n)]
    ranks = dict.fromkeys([*BYTES.values(), *(text.encode() for text in short)])
    ranks = {token: rank for rank, token in enumerate(ranks)}
    encoding = tiktoken.Encoding("x", pat_str=PUBLISHED[pattern], mergeable_ranks=ranks, special_tokens={})
    for text in short:
        pretokens = ours.find(text)
        assert "".join(pretokens) == text
        assert published is ours or published.find(text) == pretokens
        assert [pretoken for pretoken, _ in split.pre_tokenize_str(text)] == pretokens
        # All these texts are tokens, so tiktoken returns the pre-tokens.
        assert encoding.decode_tokens_bytes(encoding.encode(text)) == [pretoken.encode() for pretoken in pretokens]


def test_a_pattern_survives_saving(tmp_path):
    for pattern in PUBLISHED:
        trained(pattern).save(tmp_path)
        assert Tokenizer.load(tmp_path).fingerprint == trained(pattern).fingerprint
    assert len({trained(pattern).fingerprint for pattern in PUBLISHED}) == len(PUBLISHED)


def random_tokens(random_: random.Random) -> list[bytes]:
    """Tokens that result from merges, sometimes in another order, so that some of them result from no merges."""
    tokens = [b"a", b"b", b"c"]
    for _ in range(random_.randint(1, 8)):
        tokens.append(random_.choice(tokens) + random_.choice(tokens))
    tokens = list(dict.fromkeys(tokens[3:]))
    if random_.random() < 0.4:
        random_.shuffle(tokens)
    return tokens


def test_ranks_in_any_order_are_read_exactly(tmp_path):
    """Also tokens that no merges produce, and merges that come before those of their tokens."""
    random_, path, early, unmade = random.Random(0), tmp_path / "ranks", 0, 0
    for number in range(150):
        tokens = [*BYTES.values(), *random_tokens(random_)]
        path.write_bytes(b"".join(b"%s %d\n" % (base64.b64encode(token), i) for i, token in enumerate(tokens)))
        ranks = {token: i for i, token in enumerate(tokens)}
        encoding = tiktoken.Encoding("x", pat_str=r"[\s\S]+", mergeable_ranks=ranks, special_tokens={})
        ours = load_tiktoken(path, pattern=r"[\s\S]+")
        early += ours.used_merges.early is not None
        unmade += bool(ours.used_merges.unmade)
        others = [Tokenizer(ours.vocab, ours.merges, pattern=ours.pattern, settings=ours.settings)]
        if number % 50 == 0:  # files are slow
            save_tiktoken(ours, tmp_path / "again")
            assert (tmp_path / "again").read_bytes() == path.read_bytes()
            ours.save(tmp_path / "folder")
            save_tokenizer_json(ours, tmp_path / "tokenizer.json")
            others += [Tokenizer.load(tmp_path / name) for name in ("folder", "tokenizer.json")]
        assert {other.fingerprint for other in others} == {ours.fingerprint}
        for _ in range(10):
            text = "".join(random_.choices("abc", k=random_.randint(1, 12)))
            assert {(*program.encode(text),) for program in (ours, *others, encoding)} == {(*encoding.encode(text),)}
    assert min(early, unmade) > 10


def test_merges_in_any_order_are_read_exactly(tmp_path):
    """Also several merges for one token, and merges that are never applied."""
    random_, path, early = random.Random(0), tmp_path / "tokenizer.json", 0
    for number in range(150):
        tokens = random_tokens(random_)
        known = [b"a", b"b", b"c", *tokens]
        merges = [(x, y) for x in known for y in known if x + y in known]
        if random_.random() < 0.7:
            merges.sort(key=lambda merge: known.index(merge[0] + merge[1]))
        else:
            random_.shuffle(merges)
        content = tokenizer_json({**BYTES, **dict(enumerate(tokens, 256))}, merges)
        content["model"]["ignore_merges"] = random_.random() < 0.5
        path.write_text(json.dumps(content))
        huggingface = tokenizers.Tokenizer.from_str(json.dumps(content))
        ours = Tokenizer.load(path)
        early += ours.used_merges.early is not None
        others = []
        if number % 50 == 0:  # files are slow
            save_tokenizer_json(ours, path)
            ours.save(tmp_path / "folder")
            others = [Tokenizer.load(tmp_path / "folder"), Tokenizer.load(path)]
        assert {other.fingerprint for other in others} <= {ours.fingerprint}
        for _ in range(10):
            text = "".join(random_.choices("abc", k=random_.randint(1, 12)))
            assert [each.encode(text) for each in (ours, *others)] == [huggingface.encode(text).ids] * (len(others) + 1)
    assert early > 15
