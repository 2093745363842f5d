"""tokenizer.json and rank files, compared with the packages `tokenizers` and tiktoken."""

import base64
import copy
import itertools
import json
import random
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import tiktoken
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tiktoken.load import load_tiktoken_bpe

from basic.bytes_utils import load_merges, load_vocab, to_printable
from basic.common.errors import DamagedFileError, InvalidInputError
from basic.formats.tiktoken_ranks import load_tiktoken, save_tiktoken
from basic.formats.tokenizer_json import load_tokenizer_json, save_tokenizer_json
from basic.pretokenization import PATTERNS, resolve_pattern
from basic.Tokenizer import Tokenizer
from basic.train_bpe import train_bpe
from tests.conftest import shared_data
from tests.fixtures.make_tokenizer_fixtures import SAMPLE
from tests.test_tokenizer import TEXT_FILES

pytestmark = pytest.mark.usefixtures("plain_path")

END = "<|endoftext|>"
SPECIAL_TOKENS = [END, "<| a break |>", "<|ü|>\n"]
BYTES = {byte: bytes([byte]) for byte in range(256)}
OTHER = r"[\p{L}\p{N}]+|[^\p{L}\p{N}]{1,2}"
# The patterns of tiktoken's published encodings.
_END_OF_WORD = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
PUBLISHED = {
    "gpt2": r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s",
    "cl100k": (
        r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+"
        r"|\s++$|\s*[\r\n]|\s+(?!\S)|\s"
    ),
    "o200k": (
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+" + _END_OF_WORD + "|"
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*" + _END_OF_WORD + "|"
        r"\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    ),
    OTHER: OTHER,
}
TRICKY = ["'", "s", "'LL", "ſ", "é", "\u0301", "日本", "𝒳", "ǅ", "1", "²³", " ", "\n", "\r", "\t", "\x85", "/", "!"]
# Characters that all programs know, not those of the newest Unicode versions.
ANY_TEXT = st.lists(
    st.sampled_from([*TRICKY, *SPECIAL_TOKENS, "lower", "est"])
    | st.characters(max_codepoint=0x4FF, exclude_categories=["Cn", "Cs"]),
    max_size=15,
).map("".join)


@cache
def trained(pattern: str) -> Tokenizer:
    return Tokenizer(*train_bpe(SAMPLE, 500, SPECIAL_TOKENS, pattern=pattern), SPECIAL_TOKENS, pattern=pattern)


def tiktoken_of(ranks_path, special_tokens: dict[str, int], pattern: str) -> tiktoken.Encoding:
    ranks = load_tiktoken_bpe(str(ranks_path))
    return tiktoken.Encoding("x", pat_str=pattern, mergeable_ranks=ranks, special_tokens=special_tokens)


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
        loaded = load_tokenizer_json(json_path), load_tiktoken(ranks_path, pattern=pattern, special_tokens=special)
        assert [ours.fingerprint for ours in loaded] == [tokenizer.fingerprint] * 2
        programs = tokenizers.Tokenizer.from_file(str(json_path)), tiktoken_of(ranks_path, special, PUBLISHED[pattern])
        assert programs[0].get_vocab_size() == programs[1].n_vocab == tokenizer.vocab_size
        return programs, loaded

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
    assert load_tokenizer_json(tmp_path / "theirs.json").fingerprint == gpt2.fingerprint
    save_tiktoken(gpt2, tmp_path / "gpt2.tiktoken")
    loaded = load_tiktoken(tmp_path / "gpt2.tiktoken", pattern=PUBLISHED["gpt2"], special_tokens=[END])
    assert loaded.fingerprint == gpt2.fingerprint
    text = shared_data("naughty_strings.json").read_text(encoding="utf-8")
    encoding = tiktoken_of(tmp_path / "gpt2.tiktoken", {END: 10_256}, PUBLISHED["gpt2"])
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


def unless_refused(load: Callable[[], Tokenizer], *, message: str) -> Tokenizer | None:
    try:
        return load()
    except InvalidInputError as error:
        if message not in str(error):
            raise
        return None


def test_ranks_are_read_exactly_or_refused(tmp_path):
    random_, path, outcomes = random.Random(0), tmp_path / "ranks", {True: 0, False: 0}
    for _ in range(200):
        tokens = [*BYTES.values(), *random_tokens(random_)]
        path.write_bytes(b"".join(b"%s %d\n" % (base64.b64encode(token), i) for i, token in enumerate(tokens)))
        ranks = {token: i for i, token in enumerate(tokens)}
        encoding = tiktoken.Encoding("x", pat_str=r"[\s\S]+", mergeable_ranks=ranks, special_tokens={})
        ours = unless_refused(lambda: load_tiktoken(path, pattern=r"[\s\S]+"), message="no merges give tiktoken's ids")
        outcomes[ours is not None] += 1
        for _ in range(10):
            text = "".join(random_.choices("abc", k=random_.randint(1, 12)))
            assert ours is None or ours.encode(text) == encoding.encode(text)
    assert min(outcomes.values()) > 30


def test_merges_in_any_order_are_read_exactly_or_refused(tmp_path):
    """Also several merges for one token, and merges that are never applied."""
    random_, path, outcomes = random.Random(0), tmp_path / "tokenizer.json", {True: 0, False: 0}
    for _ in range(200):
        tokens = random_tokens(random_)
        known = [b"a", b"b", b"c", *tokens]
        merges = [(x, y) for x in known for y in known if x + y in known]
        if random_.random() < 0.7:
            merges.sort(key=lambda merge: known.index(merge[0] + merge[1]))
        else:
            random_.shuffle(merges)
        content = tokenizer_json({**BYTES, **dict(enumerate(tokens, 256))}, merges)
        path.write_text(json.dumps(content))
        huggingface = tokenizers.Tokenizer.from_str(json.dumps(content))
        ours = unless_refused(lambda: load_tokenizer_json(path), message="comes before the merges that produce")
        outcomes[ours is not None] += 1
        if ours is None:
            continue
        for _ in range(10):
            text = "".join(random_.choices("abc", k=random_.randint(1, 12)))
            assert ours.encode(text) == huggingface.encode(text).ids
        save_tokenizer_json(ours, path)
        assert load_tokenizer_json(path).fingerprint == ours.fingerprint
    assert min(outcomes.values()) > 30


# ---- tokenizer.json of other programs


def added(content: str, token_id: int, **flags: Any) -> dict[str, Any]:
    no = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return {"id": token_id, "content": content, **no, **flags}


def tokenizer_json(vocab: dict[int, bytes], merges: list[tuple[bytes, bytes]], *added_tokens) -> dict[str, Any]:
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": list(added_tokens),
        "normalizer": None,
        "pre_tokenizer": byte_level,
        "post_processor": None,
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "vocab": {to_printable(token): i for i, token in vocab.items()},
            "merges": [[to_printable(left), to_printable(right)] for left, right in merges],
        },
    }


SMALL = tokenizer_json({**BYTES, 256: b" t", 257: b" th"}, [(b" ", b"t"), (b" t", b"h")], added(END, 258))
SPLIT = {"type": "Split", "pattern": {"Regex": PATTERNS["o200k"].splits[0]}, "behavior": "Isolated", "invert": False}
NO_REGEX = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
TEMPLATE = {"type": "TemplateProcessing", "pair": [], "special_tokens": {}}
TEMPLATE["single"] = [{"Sequence": {"id": "A", "type_id": 0}}]


def sequence(*pre_tokenizers: dict[str, Any]) -> dict[str, Any]:
    return {"type": "Sequence", "pretokenizers": list(pre_tokenizers)}


def changed(path: str, value: object) -> dict[str, Any]:
    """The small tokenizer.json with another value at a dotted path."""
    content = copy.deepcopy(SMALL)
    *parents, key = path.split(".")
    container: Any = content
    for parent in parents:
        container = container[int(parent) if parent.isdigit() else parent]
    container[int(key) if key.isdigit() else key] = value
    return content


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("version", "1.0"),
        ("model.merges", ["#version: 0.2", "Ġ t", "Ġt h"]),
        ("pre_tokenizer", sequence(SPLIT, NO_REGEX)),
        ("pre_tokenizer", sequence(sequence(SPLIT, NO_REGEX))),
        ("pre_tokenizer", sequence(SPLIT | {"behavior": "Removed", "invert": True}, NO_REGEX)),
        ("pre_tokenizer", sequence(SPLIT | {"pattern": {"String": " t"}}, NO_REGEX)),
        ("pre_tokenizer", sequence(SMALL["pre_tokenizer"])),
        ("post_processor", SMALL["decoder"]),
        ("post_processor", {"type": "Sequence", "processors": [SMALL["decoder"], TEMPLATE]}),
        ("model.ignore_merges", True),
        ("model.byte_fallback", True),
        ("model.unk_token", END),
        ("model.continuing_subword_prefix", ""),
        ("model.dropout", 0.0),
        ("added_tokens", []),
        ("added_tokens", [added(END, 258, normalized=True), added("b b", 259, special=False)]),
        ("added_tokens", [added("b", ord("b")), added("!?", 258)]),
    ],
)
def test_files_of_other_programs_are_read(tmp_path, path, value):
    content = changed(path, value)
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    ours = load_tokenizer_json(tmp_path / "tokenizer.json")
    huggingface = tokenizers.Tokenizer.from_str(json.dumps(content))
    for text in ["the  three TH'S the!?", f"b b{END} th {END}", "a thé 1234\n\n ", ""]:
        assert ours.encode(text) == huggingface.encode(text).ids
        assert ours.decode(ours.encode(text)) == text
    save_tokenizer_json(ours, tmp_path / "tokenizer.json")
    assert load_tokenizer_json(tmp_path / "tokenizer.json").fingerprint == ours.fingerprint


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("normalizer", {"type": "NFC"}, 'normalizer is "NFC"'),
        ("truncation", {"max_length": 5}, "truncation is"),
        ("padding", {"pad_id": 0}, "padding is"),
        ("decoder", None, "decoder.type is null"),
        ("decoder", {"type": "WordPiece"}, 'decoder.type is "WordPiece"'),
        ("model.type", "WordPiece", 'model.type is "WordPiece"'),
        ("model.dropout", 0.1, "model.dropout is 0.1"),
        ("model.continuing_subword_prefix", "##", "model.continuing_subword_prefix"),
        ("model.end_of_word_suffix", "</w>", "model.end_of_word_suffix"),
        ("model.merges", [["Ġ", "x"]], "' x', which is not in the vocabulary"),
        ("model.merges", ["Ġ t h"], r"model.merges\[0\] is 'Ġ t h'"),
        ("model.merges", [["Ġ", "t"], ["Ġ", "t"]], r"model.merges\[1\].* is given twice"),
        ("model.merges", 5, "is not a complete tokenizer.json"),
        ("model", {}, "is not a complete tokenizer.json"),
        ("pre_tokenizer", None, "pre_tokenizer is"),
        ("pre_tokenizer", {"type": "Whitespace"}, r"pre_tokenizer is \['Whitespace'\]"),
        ("pre_tokenizer.add_prefix_space", True, "pre_tokenizer.add_prefix_space"),
        ("pre_tokenizer.use_regex", False, "pre_tokenizer.use_regex"),
        ("pre_tokenizer", sequence(SPLIT, SPLIT, NO_REGEX), "pre_tokenizer is"),
        ("pre_tokenizer", sequence(SPLIT, SMALL["decoder"]), "pre_tokenizer.use_regex"),
        *(
            ("pre_tokenizer", sequence(SPLIT | split, NO_REGEX), message)
            for split, message in [
                ({"behavior": "Removed"}, "pre_tokenizer.behavior is 'Removed' with invert = false"),
                ({"behavior": "MergedWithNext", "invert": True}, "pre_tokenizer.behavior is 'MergedWithNext'"),
                ({"pattern": {"Regex": "a"}, "behavior": "Removed", "invert": True}, "pre_tokenizer.behavior"),
                ({"pattern": {"Regex": r"\p{N}{1,3}+"}}, r"pre_tokenizer.pattern has '\{1,3\}\+'"),
                ({"pattern": {"Regex": PUBLISHED["cl100k"]}}, r"pre_tokenizer.pattern has '\{1,3\}\+'"),
                ({"pattern": {"Regex": r"a$|[^b]"}}, r"pre_tokenizer.pattern has '\$'"),
                ({"pattern": {"Regex": r"[a^]|^b"}}, r"pre_tokenizer.pattern has '\^'"),
                ({"pattern": {"Regex": "("}}, "is not in the syntax of the regex package"),
            ]
        ),
        ("post_processor", {"type": "BertProcessing"}, "post_processor.type is 'BertProcessing'"),
        (
            "post_processor",
            {"type": "Sequence", "processors": [TEMPLATE | {"single": [{"SpecialToken": {"id": END}}]}]},
            r"post_processor.processors\[0\].single\[0\] adds '<\|endoftext\|>'",
        ),
        *(("added_tokens.0." + flag, True, rf"{flag} is true") for flag in ("single_word", "lstrip", "rstrip")),
        ("added_tokens.0.id", 300, "id is 300, but the tokenizers package would give it 258"),
        ("added_tokens", [added("ab", 258), added("bc", 259, normalized=True)], "'bc' and 'ab' overlap"),
        ("added_tokens", [added(" t", 258)], "' t' as 258, where b' t' is 256"),
        ("added_tokens", [added("Ġt", 256)], "needs the token b' t'"),
        ("added_tokens", [added("", 258)], "special token 0 is empty"),
        ("model.vocab", {"<|endoftext|>": 258}, "model.vocab lacks a token for the byte 0x00"),
        ("model.vocab.x", 256, "as 256, where"),
    ],
)
def test_the_error_names_what_is_not_supported(tmp_path, path, value, message):
    (tmp_path / "tokenizer.json").write_text(json.dumps(changed(path, value)))
    damaged = "complete" in message
    with pytest.raises(DamagedFileError if damaged else InvalidInputError, match=message) as error:
        load_tokenizer_json(tmp_path / "tokenizer.json")
    assert "tokenizer.json'" in str(error.value)


def test_tokens_without_a_merge_are_refused_only_with_ignore_merges(tmp_path):
    content = changed("model.vocab.the", 258)
    content["added_tokens"] = []
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    huggingface = tokenizers.Tokenizer.from_str(json.dumps(content))
    assert load_tokenizer_json(tmp_path / "tokenizer.json").encode("the") == huggingface.encode("the").ids
    content["model"]["ignore_merges"] = True
    assert tokenizers.Tokenizer.from_str(json.dumps(content)).encode("the").ids == [258]
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(InvalidInputError, match=r"model.ignore_merges is true, .* for the token b'the'"):
        load_tokenizer_json(tmp_path / "tokenizer.json")


# ---- tokenizers that cannot be written


@pytest.mark.parametrize(
    ("tokenizer", "message"),
    [
        (Tokenizer({0: b"a"}, []), "the vocabulary lacks a token for the byte 0x00"),
        (Tokenizer({**BYTES, 256: b"a"}, []), "the ids 97 and 256 would both be written as 'a'"),
        (Tokenizer({**BYTES}, [], ["Ġ"]), "the ids 32 and 256 would both be written as 'Ġ'"),
        (Tokenizer({**BYTES, 256: b"aa", 257: b"aaa"}, [(b"aa", b"a"), (b"a", b"a")]), "comes before the merges"),
        (Tokenizer(BYTES, [], pattern=r"\w+$|."), r"the tokenizer's pattern has '\$'"),
    ],
)
def test_tokenizers_that_tokenizer_json_cannot_express(tmp_path, tokenizer, message):
    with pytest.raises(InvalidInputError, match=message):
        save_tokenizer_json(tokenizer, tmp_path / "tokenizer.json")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("tokenizer", "message"),
    [
        (Tokenizer({0: b"a"}, []), "the vocabulary lacks a token for the byte 0x00"),
        (Tokenizer({**BYTES, 256: b"a"}, []), "the ids 97 and 256 are both b'a'"),
        (Tokenizer({**BYTES, 256: b"abc"}, []), "the token b'abc' of rank 256 does not result from two tokens"),
        (Tokenizer({**BYTES, 256: b"ab"}, []), "must be in the order of the merges"),
        (
            Tokenizer({**BYTES, 256: b"ab", 257: b"bc"}, [(b"b", b"c"), (b"a", b"b")]),
            "must be in the order",
        ),
        (Tokenizer(BYTES, [], pattern="[a-z]+|[0-9]"), r"pattern '\[a-z\]\+\|\[0-9\]' may leave out characters"),
        (Tokenizer(BYTES, [], pattern=r"\w+(?!x)|\W"), "may leave out characters, which tiktoken would drop"),
    ],
)
def test_tokenizers_that_ranks_cannot_express(tmp_path, tokenizer, message):
    with pytest.raises(InvalidInputError, match=message):
        save_tiktoken(tokenizer, tmp_path / "ranks")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("pattern", ["gpt2", "cl100k", "o200k", "llama3", "qwen2", r"\w+|\W"])
def test_ranks_of_a_pattern_that_leaves_nothing_out(tmp_path, pattern):
    ours = Tokenizer({**BYTES, 256: b"ab"}, [(b"a", b"b")], pattern=pattern)
    save_tiktoken(ours, tmp_path / "ranks")
    assert load_tiktoken(tmp_path / "ranks", pattern=pattern).fingerprint == ours.fingerprint
    text = "ab cab! \n\n a1b\u3000\u0301"
    assert tiktoken_of(tmp_path / "ranks", {}, ours.compiled_pattern.splits[0]).encode(text) == ours.encode(text)


def test_special_tokens_that_are_also_ordinary_tokens(tmp_path):
    ours = Tokenizer({**BYTES, 256: b" t", 257: b"x y"}, [(b" ", b"t")], [" t", "\n", "x y"])
    save_tokenizer_json(ours, tmp_path / "tokenizer.json")
    save_tiktoken(ours, tmp_path / "ranks")
    from_ranks = load_tiktoken(tmp_path / "ranks", pattern="gpt2", special_tokens=ours.special_token_ids)
    for other in (load_tokenizer_json(tmp_path / "tokenizer.json"), from_ranks):
        assert other.fingerprint == ours.fingerprint
    huggingface = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    text = "a t\nx y the  t"
    assert huggingface.encode(text).ids == ours.encode(text)
    assert huggingface.decode(ours.encode(text), skip_special_tokens=False) == text


LINES = b"".join(b"%s %d\n" % (base64.b64encode(bytes([byte])), byte) for byte in range(256))


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (b"YWI=256\n", r"line 257: b'YWI=256' must be a token in base64, a space and a rank"),
        (b"\n\nYW_I 256\n", "line 259"),
        (b"YWI= -1\n", "line 257"),
        (b" 256\n", "line 257"),
        (b"YQ== 256\n", "line 257: the token b'a' is given twice"),
        (b"YWI= 97\n", "the tokens b'a' and b'ab' have the same rank"),
        (b"YWJj 256\n", "the token b'abc' of rank 256 does not result from two tokens of lower ranks, but from 3"),
        (b"YWJj 256\nYWI= 257\n", "the token b'abc' of rank 256"),
    ],
)
def test_bad_rank_files(tmp_path, more, message):
    (tmp_path / "ranks").write_bytes(LINES + more)
    damaged = "of rank 256" not in message
    with pytest.raises(DamagedFileError if damaged else InvalidInputError, match=message) as error:
        load_tiktoken(tmp_path / "ranks", pattern="gpt2")
    assert "ranks'" in str(error.value)


def test_special_tokens_of_rank_files(tmp_path):
    (tmp_path / "ranks").write_bytes(LINES)
    assert load_tiktoken(tmp_path / "ranks", pattern="gpt2", special_tokens=["<a>"]).encode("<a>") == [256]
    assert load_tiktoken(tmp_path / "ranks", pattern="gpt2", special_tokens={"<a>": 300}).encode("<a>") == [300]
    for special_tokens in [{"<a>": 97}, {"a": 98}, {"a": 300}]:
        with pytest.raises(InvalidInputError, match=r"cannot have the id .* the token has another rank"):
            load_tiktoken(tmp_path / "ranks", pattern="gpt2", special_tokens=special_tokens)
    (tmp_path / "ranks").write_bytes(LINES[: LINES.index(b"\n", 999) + 1])
    with pytest.raises(InvalidInputError, match="the file lacks a token for the byte"):
        load_tiktoken(tmp_path / "ranks", pattern="gpt2")
