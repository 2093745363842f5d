"""Fields of tokenizer.json, compared with the package `tokenizers`."""

import copy
import itertools
import json
from typing import Any

import pytest
import tokenizers

from basic.common.errors import DamagedFileError, InvalidInputError
from basic.formats.tokenizers import save_tokenizer_json
from basic.pretokenization import PATTERNS
from basic.Tokenizer import Tokenizer
from tests.helpers.tokenizer_tools import BYTES, END, PUBLISHED, added, tokenizer_json

pytestmark = pytest.mark.usefixtures("plain_path")


SMALL = tokenizer_json({**BYTES, 256: b" t", 257: b" th"}, [(b" ", b"t"), (b" t", b"h")], added(END, 258))
NFC = {"type": "NFC"}
SPLIT = {"type": "Split", "pattern": {"Regex": PATTERNS["o200k"].splits[0]}, "behavior": "Isolated", "invert": False}
NO_REGEX = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
TEMPLATE = {"type": "TemplateProcessing", "pair": [], "special_tokens": {}}
TEMPLATE["single"] = [{"Sequence": {"id": "A", "type_id": 0}}]
BOS = {"type": "TemplateProcessing", "pair": [], "single": [{"SpecialToken": {"id": END, "type_id": 0}}]}
BOS["single"] += TEMPLATE["single"]
BOS["special_tokens"] = {END: {"id": END, "ids": [258], "tokens": [END]}}
BOTH_ENDS = {"type": "RobertaProcessing", "cls": [END, 258], "sep": ["t", 116], "trim_offsets": True}
BOTH_ENDS["add_prefix_space"] = False


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
    ours = Tokenizer.load(tmp_path / "tokenizer.json")
    huggingface = tokenizers.Tokenizer.from_str(json.dumps(content))
    for text in ["the  three TH'S the!?", f"b b{END} th {END}", "a thé 1234\n\n ", ""]:
        assert ours.encode(text) == huggingface.encode(text).ids
        assert ours.decode(ours.encode(text)) == text
    save_tokenizer_json(ours, tmp_path / "tokenizer.json")
    assert Tokenizer.load(tmp_path / "tokenizer.json").fingerprint == ours.fingerprint


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("normalizer", {"type": "NFKC"}, 'normalizer is "NFKC"'),
        ("normalizer", {"type": "Sequence", "normalizers": [NFC, {"type": "Lowercase"}]}, 'normalizer is "Lowercase"'),
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
        ("pre_tokenizer", sequence(), r"pre_tokenizer is \[\]"),
        ("pre_tokenizer", sequence(NO_REGEX, SPLIT), r"pre_tokenizer is \['ByteLevel', 'Split'\]"),
        ("pre_tokenizer", sequence({"type": "Punctuation"}, NO_REGEX), r"pre_tokenizer is \['Punctuation'"),
        *(
            ("pre_tokenizer", sequence(SPLIT | split, NO_REGEX), message)
            for split, message in [
                ({"behavior": "Removed"}, "pre_tokenizer.behavior is 'Removed' with invert = false"),
                ({"behavior": "MergedWithNext", "invert": True}, "pre_tokenizer.behavior is 'MergedWithNext'"),
                ({"pattern": {"Regex": "a"}, "behavior": "Removed", "invert": True}, "pre_tokenizer.behavior"),
                ({"pattern": {"Regex": r"\p{N}{1,3}+"}}, r"pre_tokenizer.pattern has '\{1,3\}\+'"),
                ({"pattern": {"Regex": PUBLISHED["cl100k"]}}, r"pre_tokenizer.pattern has '\{1,3\}\+'"),
                ({"pattern": {"Regex": r"a$|[^b]"}}, r"pre_tokenizer.pattern has '\$'"),
                ({"pattern": {"Regex": r"[a^$]|^b"}}, r"pre_tokenizer.pattern has '\^'"),
                ({"pattern": {"Regex": r"[]a&&b]"}}, r"pre_tokenizer.pattern has '&&'"),
                ({"pattern": {"Regex": r"[a[bc]]"}}, r"pre_tokenizer.pattern has '\['"),
                ({"pattern": {"Regex": r"\h"}}, r"pre_tokenizer.pattern has '\\\\h'"),
                ({"pattern": {"Regex": "("}}, "is not in the syntax of the regex package"),
            ]
        ),
        ("post_processor", {"type": "BertProcessing"}, "post_processor is incomplete"),
        ("post_processor", {"type": "Sequence", "processors": [BOTH_ENDS, BOTH_ENDS]}, "has several processors"),
        ("post_processor", {"type": "Other"}, "post_processor.type is 'Other'"),
        (
            "post_processor",
            TEMPLATE | {"single": [*TEMPLATE["single"], *TEMPLATE["single"]]},
            r"post_processor.single\[1\]",
        ),
        ("post_processor", TEMPLATE | {"single": []}, "post_processor.single has no text A"),
        ("post_processor", TEMPLATE | {"single": [{"SpecialToken": {"id": END}}]}, "post_processor is incomplete"),
        ("post_processor", {"type": "BertProcessing", "sep": [END, 258], "cls": ["x", 300]}, "adds the id 300"),
        ("added_tokens.0.single_word", True, "single_word is true"),
        ("added_tokens.0.id", 300, "id is 300, but the tokenizers package would give it 258"),
        ("added_tokens", [added("ab", 258), added("bc", 259, normalized=True)], "'bc' and 'ab' overlap"),
        *(
            ("added_tokens", [added(token, 258, normalized=True), added("bc", 259, **{flag: True})], "and 'bc' overlap")
            for token, flag in (("  ", "rstrip"), (" x", "rstrip"), ("x ", "lstrip"))
        ),
        ("added_tokens", [added(" t", 258)], "' t' as 258, where b' t' is 256"),
        ("added_tokens", [added("Ġt", 256)], "needs the token b' t'"),
        ("added_tokens", [added("", 258)], "special token 0 is empty"),
        ("added_tokens", [added("ab", 258, lstrip=True), added("bc", 259)], "'ab' and 'bc' share characters"),
        ("added_tokens", [added("aba", 258, rstrip=True)], "'aba' and 'aba' share characters"),
        (
            "model",
            SMALL["model"] | {"ignore_merges": True, "vocab": SMALL["model"]["vocab"] | {END: 258, "日": 259}},
            "'日', which",
        ),
        ("model.vocab.x", 256, "as 256, where"),
    ],
)
def test_the_error_names_what_is_not_supported(tmp_path, path, value, message):
    (tmp_path / "tokenizer.json").write_text(json.dumps(changed(path, value)))
    damaged = "not a complete" in message
    with pytest.raises(DamagedFileError if damaged else InvalidInputError, match=message) as error:
        Tokenizer.load(tmp_path / "tokenizer.json")
    assert "tokenizer.json'" in str(error.value)


@pytest.mark.parametrize("ignore_merges", [False, True])
def test_tokens_without_a_merge_are_used_with_ignore_merges(tmp_path, ignore_merges):
    content = changed("model.vocab.the", 258)
    content["added_tokens"] = []
    content["model"]["ignore_merges"] = ignore_merges
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    huggingface = tokenizers.Tokenizer.from_str(json.dumps(content))
    ours = Tokenizer.load(tmp_path / "tokenizer.json")
    assert ours.encode("the the") == huggingface.encode("the the").ids
    assert (258 in ours.encode("the the")) == ignore_merges
    ours.save(tmp_path / "folder")
    loaded = Tokenizer.load(tmp_path / "folder")
    assert (loaded.encode("the the"), loaded.fingerprint) == (ours.encode("the the"), ours.fingerprint)


TRUNCATION = {"direction": "Right", "max_length": 1, "strategy": "LongestFirst", "stride": 0}
PADDING: dict[str, Any] = {"strategy": {"Fixed": 1}, "direction": "Left", "pad_to_multiple_of": None}
PADDING |= {"pad_id": 0, "pad_type_id": 0, "pad_token": "!"}


@pytest.mark.parametrize(("field", "value"), [("truncation", TRUNCATION), ("padding", PADDING)])
def test_truncation_and_padding_are_ignored_with_a_warning(tmp_path, field, value):
    (tmp_path / "tokenizer.json").write_text(json.dumps(changed(field, value)))
    with pytest.warns(UserWarning, match=rf"{field} is .*: 1.*, which is ignored"):
        assert len(Tokenizer.load(tmp_path / "tokenizer.json").encode("the the")) > 1


@pytest.mark.filterwarnings("ignore:.*which is ignored")
def test_values_that_the_package_refuses_are_refused(tmp_path):
    with_both = {**SMALL, "truncation": TRUNCATION, "padding": PADDING}
    model = ("dropout", "unk_token", "fuse_unk", "byte_fallback", "ignore_merges", "end_of_word_suffix")
    paths: list[tuple[Any, ...]] = [("version",), ("truncation",), ("padding",), *(("model", field) for field in model)]
    paths += [("truncation", field) for field in TRUNCATION] + [("padding", field) for field in PADDING]
    paths += [("added_tokens", 0, field) for field in ("special", "normalized", "lstrip", "single_word")]
    num_refused = 0
    for path, value in itertools.product(paths, [None, 1, -1, 1.5, "1.0", "x", True, [], {}]):
        content = copy.deepcopy(with_both)
        container: Any = content
        for key in path[:-1]:
            container = container[key]
        container[path[-1]] = value
        (tmp_path / "tokenizer.json").write_text(json.dumps(content))
        try:
            tokenizers.Tokenizer.from_str(json.dumps(content))
        except BaseException:
            num_refused += 1
            with pytest.raises((InvalidInputError, DamagedFileError), match=path[-1] if len(path) < 3 else "added_tok"):
                Tokenizer.load(tmp_path / "tokenizer.json")
            continue
        if path[0] != "model" and value is not True:
            Tokenizer.load(tmp_path / "tokenizer.json")
    assert num_refused > 120


# ---- what splits a text

DEEPSEEK = PATTERNS["deepseek"].splits


@pytest.mark.parametrize(
    "steps",
    [
        [NO_REGEX],
        [{"type": "Digits", "individual_digits": True}, SMALL["decoder"]],
        [{"type": "Digits", "individual_digits": False}, SMALL["decoder"]],
        [*({**SPLIT, "pattern": {"Regex": split}} for split in DEEPSEEK), NO_REGEX],
        [{**SPLIT, "pattern": {"Regex": PATTERNS["llama3"].splits[0]}}, NO_REGEX],
        [{**SPLIT, "pattern": {"Regex": PATTERNS["qwen2"].splits[0]}}, sequence(), NO_REGEX],
        [{**SPLIT, "pattern": {"Regex": r"[]a^$-]+|\s[^\]$]"}}, sequence(sequence(), NO_REGEX)],
        [{**SPLIT, "pattern": {"String": "the"}}, {**SPLIT, "pattern": {"Regex": r"\d"}}, SMALL["decoder"]],
    ],
)
def test_every_sequence_of_pre_tokenizers_splits_the_same(tmp_path, steps):
    """All texts of up to four of some characters, each of which may end a pre-token."""
    content = changed("pre_tokenizer", sequence(*steps))
    # So that ids show the pre-tokens: neighbors that are not divided become one token.
    pieces = ["a", "S", "'", " ", "\n", "1", "the", "é", "中"]
    pairs = [(x.encode(), y.encode()) for x in "aS' \n1" for y in "aS' \n1"]
    content["model"] = tokenizer_json({**BYTES, **{256 + i: x + y for i, (x, y) in enumerate(pairs)}}, pairs)["model"]
    content["added_tokens"] = []
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    ours = Tokenizer.load(tmp_path / "tokenizer.json")
    save_tokenizer_json(ours, tmp_path / "ours.json")
    assert Tokenizer.load(tmp_path / "ours.json").fingerprint == ours.fingerprint
    theirs = [tokenizers.Tokenizer.from_file(str(tmp_path / name)) for name in ("tokenizer.json", "ours.json")]
    for length in range(1, 5):
        for text in map("".join, itertools.product(pieces, repeat=length)):
            ids = ours.encode(text)
            assert [huggingface.encode(text).ids for huggingface in theirs] == [ids, ids], text


# ---- what is added to a text


@pytest.mark.parametrize(
    ("processor", "before", "after"),
    [
        (None, [], []),
        (TEMPLATE, [], []),
        (BOS, [258], []),
        (BOTH_ENDS, [258], [116]),
        ({"type": "BertProcessing", "cls": [END, 258], "sep": ["t", 116]}, [258], [116]),
        ({"type": "Sequence", "processors": [SMALL["decoder"], BOS]}, [258], []),
    ],
)
def test_the_template_is_applied_when_asked_and_written_back(tmp_path, processor, before, after):
    content = changed("post_processor", processor)
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    ours = Tokenizer.load(tmp_path / "tokenizer.json")
    ours.save(tmp_path / "folder")
    save_tokenizer_json(Tokenizer.load(tmp_path / "folder"), tmp_path / "again.json")
    again = Tokenizer.load(tmp_path / "again.json")
    huggingface = tokenizers.Tokenizer.from_file(str(tmp_path / "again.json"))
    for text in ["", f"the {END} three"]:
        ids = ours.encode(text, template=True)
        assert ids == [*before, *ours.encode(text), *after] == huggingface.encode(text).ids
        assert again.encode(text, template=True) == ids == ours.encode_batch([text], template=True)[0]
        assert ours.encode(text) == huggingface.encode(text, add_special_tokens=False).ids
    assert json.loads((tmp_path / "again.json").read_text())["post_processor"] == processor
