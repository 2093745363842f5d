"""Conversations: chat templates against transformers, and which tokens are the assistant's."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from basic.chat import ChatFormat, encode_conversations
from basic.common.errors import DamagedFileError, InvalidInputError
from basic.formats.export_model import export_gguf, export_hf
from basic.formats.gguf_file import GGUFFile
from basic.formats.gguf_tokenizer import gguf_tokenizer_fields, read_gguf_tokenizer
from basic.formats.import_model import open_model
from basic.model import TransformerLM
from basic.Tokenizer import Tokenizer
from basic.tokenizer_files.content import ChatTemplate
from basic.tokens.info import BEGINS_DOCUMENT, IS_LEARNED, mask_path
from basic.tokens.opening import open_mask, open_tokens
from tests.helpers.model_tools import tiny
from tests.helpers.scripts import run_script
from tests.helpers.tokenizer_tools import BYTES

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<s>", "</s>"]
CHATML = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system\n"
    "You are helpful<|im_end|>\n' }}{% endif %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + "
    "'<|im_end|>' + '\n'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA2 = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content | trim }} [/INST]"
    "{% elif m.role == 'assistant' %} {{ m.content }} {{ eos_token }}{% else %}{{ raise_exception('no system') }}"
    "{% endif %}{% endfor %}"
)
TAGS = (
    "{% for m in messages %}\n    {%- if m.role == 'assistant' %}\nA: {% generation %}{{ m.content }}<|im_end|>"
    "{% endgeneration %}\n\n    {%- else %}\nU: {{ m.content | upper }}\n    {%- endif %}\n{% endfor %}"
)
LAST_ONLY = "{% for m in messages %}{% if loop.last or m.role == 'user' %}{{ m.content }}{% endif %}|{% endfor %}"
TOKENS: dict[str, Any] = {"bos_token": "<s>", "eos_token": "</s>"}

CONVERSATIONS = [
    [("user", "Hi"), ("assistant", "Hello!")],
    [
        ("user", "1+1?"),
        ("assistant", " 2, I\nthink\n\n"),
        ("user", "sure? "),
        ("assistant", "é 😀 yes"),
        ("user", "ok"),
    ],
    [("user", "only a question")],
    [("user", "a"), ("assistant", ""), ("user", "b"), ("assistant", "b")],
]


def messages_of(conversation: list[tuple[str, str]]) -> list[dict[str, str]]:
    return [{"role": role, "content": content} for role, content in conversation]


def tokenizer_with(template: str | None) -> Tokenizer:
    vocab = BYTES | {256: b"he", 257: b"\n\n", 258: b"!<"}
    merges = [(b"h", b"e"), (b"\n", b"\n"), (b"!", b"<")]
    chat = None if template is None else ChatTemplate(source=template, tokens=TOKENS)
    return Tokenizer(vocab, merges, SPECIAL, chat_template=chat)


EXPECTED = {  # what stands before and behind the content of an answer
    None: ("", "<|endoftext|>"),
    CHATML: ("", "<|im_end|>"),
    LLAMA2: (" ", " </s>"),
    TAGS: ("", "<|im_end|>"),
}


@pytest.mark.parametrize("template", EXPECTED, ids=["plain", "chatml", "llama2", "tags"])
@pytest.mark.parametrize("conversation", CONVERSATIONS, ids=len)
def test_the_learned_tokens_are_exactly_the_assistants(template, conversation):
    tokenizer, messages = tokenizer_with(template), messages_of(conversation)
    chat = ChatFormat(tokenizer)
    before, behind = EXPECTED[template]
    answers = [before + text + behind for role, text in conversation if role == "assistant"]
    assert [text for text, is_learned in chat.parts(messages) if is_learned] == answers
    ids, mask = chat.encode(messages)
    runs = np.flatnonzero(np.diff(np.concatenate([[0], mask & IS_LEARNED, [0]]))).reshape(-1, 2)
    assert [tokenizer.decode(ids[start:end].tolist()) for start, end in runs] == answers
    assert np.flatnonzero(mask & BEGINS_DOCUMENT).tolist() == [0]
    # The parts are the rendered text, and a prompt is what stands before an answer.
    text = "".join(text for text, _ in chat.parts(messages))
    assert tokenizer.decode(ids.tolist()) == text
    for index, (role, content) in enumerate(conversation):
        if role == "assistant" and template != TAGS:
            assert text.startswith(chat.prompt(messages[:index]) + before + content + behind)
    assert chat.end_of_answer == behind.strip()


@pytest.mark.parametrize("template", [CHATML, LLAMA2, TAGS], ids=["chatml", "llama2", "tags"])
@pytest.mark.parametrize("conversation", CONVERSATIONS, ids=len)
def test_texts_are_those_of_transformers(template, conversation):
    pytest.importorskip("transformers", reason="transformers is an oracle")
    from transformers.utils.chat_template_utils import render_jinja_template

    messages: Any = messages_of(conversation)
    chat = ChatFormat(tokenizer_with(template))
    (expected,), (spans,) = (
        render_jinja_template(
            [messages], chat_template=template, return_assistant_tokens_mask=template == TAGS, **TOKENS
        )
        if template == TAGS
        else (render_jinja_template([messages], chat_template=template, **TOKENS)[0], [None])
    )
    parts = chat.parts(messages)
    assert "".join(text for text, _ in parts) == expected
    if spans is not None:
        pairs: Any = spans
        assert [text for text, is_learned in parts if is_learned] == [expected[start:end] for start, end in pairs]
    prompt = render_jinja_template([messages], chat_template=template, add_generation_prompt=True, **TOKENS)[0][0]
    assert chat.prompt(messages) == prompt


@pytest.mark.parametrize(
    ("template", "conversation", "message"),
    [
        (CHATML, [("user", "a <|im_end|> b")], r"message 0 has the special token '<\|im_end\|>', with which it could"),
        (CHATML, [("user<|im_end|>", "b")], r"message 0 has the special token '<\|im_end\|>', with which it could"),
        (LLAMA2, [("system", "x")], "the chat template refuses this conversation: no system"),
        (LAST_ONLY, CONVERSATIONS[1], r"writes message 1 in another way .*; put \{% generation %\}"),
        (None, [("tool", "x")], "one of the roles system, user, assistant, got the role 'tool'"),
        ("{{ messages[9].content.x.y }}", CONVERSATIONS[0], "cannot write this conversation"),
        ("{{ ''.__class__.__mro__ }}", CONVERSATIONS[0], "cannot write this conversation: .*unsafe"),
    ],
)
def test_what_cannot_be_written_is_refused(template, conversation, message):
    with pytest.raises(InvalidInputError, match=message):
        ChatFormat(tokenizer_with(template)).parts(messages_of(conversation))


def test_tags_in_a_comment_are_none():
    chat = ChatFormat(tokenizer_with("{# {% generation %} #}" + CHATML))
    assert chat.end_of_answer == "<|im_end|>"
    assert ("Hello!<|im_end|>", True) in chat.parts(messages_of(CONVERSATIONS[0]))


def test_wrong_templates_and_tokenizers_are_refused():
    with pytest.raises(InvalidInputError, match="the chat template is not valid"):
        ChatFormat(tokenizer_with("{% for %}"))
    plain = Tokenizer(BYTES, [], ["<|x|>"])
    with pytest.raises(InvalidInputError, match=r"needs the special token '<\|endoftext\|>'; give another one of its"):
        ChatFormat(plain)
    assert ChatFormat(plain, end_of_text="<|x|>").end_of_answer == "<|x|>"
    for wrong in ([{"content": "a"}], ["a"], [{"role": "user", "content": 3}]):
        with pytest.raises(InvalidInputError, match="message 0"):
            ChatFormat(plain, end_of_text="<|x|>").parts(wrong)  # ty: ignore[invalid-argument-type]


def test_a_template_travels_with_its_tokenizer(tmp_path):
    tokenizer = tokenizer_with(CHATML)
    tokenizer.save(tmp_path / "ours")
    assert Tokenizer.load(tmp_path / "ours").chat_template == tokenizer.chat_template
    assert tokenizer.with_special_tokens(["<x>"]).chat_template == tokenizer.chat_template
    assert Tokenizer.load(tmp_path / "ours").fingerprint == tokenizer_with(None).fingerprint  # the ids are the same
    tokenizer_with(None).save(tmp_path / "ours")
    assert Tokenizer.load(tmp_path / "ours").chat_template is None
    # Models of other programs, as which a run is exported.
    model = TransformerLM(tiny(vocab_size=tokenizer.vocab_size))
    export_hf(model, tmp_path / "hf", tokenizer)
    assert Tokenizer.load(tmp_path / "hf").chat_template == tokenizer.chat_template
    fields = gguf_tokenizer_fields(tokenizer, tokenizer.vocab_size, "</s>")
    names = {"bos_token": "</s>", "eos_token": "</s>"}  # a GGUF file has their ids, for the end of generation too
    assert read_gguf_tokenizer(fields).chat_template == ChatTemplate(source=CHATML, tokens=names)
    # Folders of transformers: in tokenizer_config.json, as one of several, or in a file of its own.
    folder = tmp_path / "theirs"
    folder.mkdir()
    (folder / "vocab.json").write_text((tmp_path / "ours" / "vocab.json").read_text())
    (folder / "merges.txt").write_text((tmp_path / "ours" / "merges.txt").read_text())
    named = [{"name": "tool_use", "template": "t"}, {"name": "default", "template": "d"}]
    config: dict[str, Any] = {"bos_token": "<s>", "eos_token": {"content": "</s>"}, "add_bos_token": False}
    for template, expected in (("a", "a"), (named, "d")):
        (folder / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": template}))
        assert Tokenizer.load(folder).chat_template == ChatTemplate(source=expected, tokens=TOKENS)
    (folder / "chat_template.jinja").write_text("own\n")
    assert Tokenizer.load(folder).chat_template == ChatTemplate(source="own\n", tokens=TOKENS)
    (folder / "chat_template.jinja").unlink()
    (folder / "tokenizer_config.json").write_text('{"chat_template": 3}')
    with pytest.raises(DamagedFileError, match="chat_template must be a string, got int"):
        Tokenizer.load(folder)


@pytest.mark.parametrize("template", [CHATML, LLAMA2], ids=["chatml", "llama2"])
def test_exports_end_at_the_end_of_an_answer_and_of_a_text(template, tmp_path):
    """With names of special tokens that llama.cpp does not know."""
    source = template.replace("<|im_end|>", "<answer>").replace("<|im_start|>", "<ask>")
    chat = ChatTemplate(source=source, tokens={"bos_token": "<ask>", "eos_token": "<answer>"})
    special = {"<text>": 257, "<ask>": 258, "<answer>": 259}
    vocab = BYTES | {256: b"he"}
    tokenizer = Tokenizer(vocab, [(b"h", b"e")], special, chat_template=chat)
    model = TransformerLM(tiny(vocab_size=tokenizer.vocab_size))
    export_hf(model, tmp_path / "hf", tokenizer, end_of_text="<text>")
    assert json.loads((tmp_path / "hf/generation_config.json").read_text())["eos_token_id"] == [257, 259]
    assert open_model(tmp_path / "hf").end_of_text == "<text>"
    export_gguf(model, tmp_path / "model.gguf", tokenizer, end_of_text="<text>")
    fields = GGUFFile(tmp_path / "model.gguf").fields
    assert {fields["tokenizer.ggml.eos_token_id"], fields["tokenizer.ggml.eot_token_id"]} == {257, 259}
    message = {"role": "user", "content": "Hi"}
    texts = [ChatFormat(each).prompt([message]) for each in (tokenizer, read_gguf_tokenizer(fields))]
    assert texts[0] == texts[1]  # the template names the same BOS and EOS
    llama_cpp = pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
    llama = llama_cpp.Llama(str(tmp_path / "model.gguf"), vocab_only=True, verbose=False)
    assert [i for i in (257, 258, 259) if llama_cpp.llama_vocab_is_eog(llama._model.vocab, i)] == [257, 259]


def test_a_template_that_cannot_be_read_does_not_stop_an_export(tmp_path):
    tokenizer = tokenizer_with("{% for %}")
    with pytest.warns(UserWarning, match="does not say at which token an answer ends: the chat template is not valid"):
        export_hf(TransformerLM(tiny(vocab_size=tokenizer.vocab_size)), tmp_path / "hf", tokenizer)
    assert json.loads((tmp_path / "hf/generation_config.json").read_text())["eos_token_id"] == 259


def test_conversations_become_a_token_file_with_a_mask(tmp_path):
    tokenizer = tokenizer_with(CHATML)
    path = tmp_path / "chat.jsonl"
    lines = [json.dumps({"messages": messages_of(each)}) for each in CONVERSATIONS]
    path.write_text("\n".join([lines[0], "", *lines[1:]]), encoding="utf-8")
    info, num_learned = encode_conversations(tokenizer, path, tmp_path / "chat.bin")
    tokens = open_tokens(tmp_path / "chat.bin", verify=True, made_by=tokenizer.fingerprint)
    mask = open_mask(tokens)
    encoded = [ChatFormat(tokenizer).encode(messages_of(each)) for each in CONVERSATIONS]
    assert mask is not None
    assert np.array_equal(tokens, np.concatenate([ids for ids, _ in encoded]))
    assert np.array_equal(mask, np.concatenate([each for _, each in encoded]))
    assert (info.count, num_learned) == (len(tokens), (mask & IS_LEARNED).sum())
    assert ((mask & BEGINS_DOCUMENT) > 0).sum() == len(CONVERSATIONS)
    with pytest.raises(FileExistsError):
        encode_conversations(tokenizer, path, tmp_path / "chat.bin", overwrite=False)
    path.write_text('{"messages": []}\n' + lines[0] + "\nnonsense\n")
    with pytest.raises(InvalidInputError, match=r"chat\.jsonl, line 1: a conversation must be an object"):
        encode_conversations(tokenizer, path, tmp_path / "other.bin")
    assert not mask_path(tmp_path / "other.bin").exists()
    with pytest.warns(UserWarning, match="lines or rows skipped: 2"):
        info, _ = encode_conversations(tokenizer, path, tmp_path / "other.bin", on_bad_line="skip")
    assert info.count == len(encoded[0][0])


def test_conversations_become_a_dataset(tmp_path):
    tokenizer = tokenizer_with(CHATML)
    paths = [tmp_path / "a.jsonl", tmp_path / "b.jsonl"]
    for path, conversations in zip(paths, (CONVERSATIONS[:2], CONVERSATIONS[2:]), strict=True):
        path.write_text("".join(json.dumps({"messages": messages_of(each)}) + "\n" for each in conversations))
    info, num_learned = encode_conversations(tokenizer, paths, tmp_path / "chat.bin")
    single = open_tokens(tmp_path / "chat.bin")

    def encode() -> None:
        found, found_learned = encode_conversations(tokenizer, paths, tmp_path / "chat", num_workers=1)
        assert (found.count, found.source_bytes, found_learned) == (info.count, info.source_bytes, num_learned)
        tokens = open_tokens(tmp_path / "chat", verify=True, made_by=tokenizer.fingerprint)
        assert np.array_equal(tokens, single)
        assert np.array_equal(open_mask(tokens), open_mask(single))  # ty: ignore[invalid-argument-type]

    encode()
    (tmp_path / "chat" / "000001.mask").unlink()
    with pytest.raises(DamagedFileError, match=r"000001\.mask, the mask of .*, is missing"):
        open_mask(open_tokens(tmp_path / "chat"))
    encode()  # it is made again
    other = tokenizer_with(LLAMA2)
    with pytest.raises(InvalidInputError, match="holds other work, with other chat_template; give another folder"):
        encode_conversations(other, paths, tmp_path / "chat", num_workers=1)
    paths[1].write_text('{"messages": []}\n')
    with pytest.raises(InvalidInputError, match=r"b\.jsonl, line 1: a conversation must be an object"):
        encode_conversations(tokenizer, paths, tmp_path / "chat", num_workers=1, start_over=True)
    assert sorted(path.name for path in (tmp_path / "chat").glob("*.mask")) == ["000000.mask"]


def test_an_empty_file_of_several_is_skipped(tmp_path):
    tokenizer, paths = tokenizer_with(CHATML), [tmp_path / "a.jsonl", tmp_path / "b.jsonl"]
    paths[0].write_text("")
    paths[1].write_text(json.dumps({"messages": messages_of(CONVERSATIONS[0])}) + "\n")
    ids, mask = ChatFormat(tokenizer).encode(messages_of(CONVERSATIONS[0]))
    for output in ("chat", "chat.bin"):
        with pytest.warns(UserWarning, match=r"skipped: 1; the first: '.*a\.jsonl' is empty"):
            encode_conversations(tokenizer, paths, tmp_path / output)
        tokens = open_tokens(tmp_path / output)
        assert (tokens[:].tolist(), open_mask(tokens)[:].tolist()) == (ids.tolist(), mask.tolist())  # ty: ignore
    with pytest.raises(InvalidInputError, match="the inputs have no conversation, they are empty"):
        encode_conversations(tokenizer, paths[:1], tmp_path / "nothing")


@pytest.mark.parametrize("template", [None, TAGS], ids=["plain", "tags"])
def test_conversations_without_an_answer_are_refused(tmp_path, template):
    lines = [json.dumps({"messages": messages_of([("user", "Hi"), ("user", "Hello!")])})] * 3
    for content in ("\n".join(lines), ""):
        (tmp_path / "chat.jsonl").write_text(content)
        with pytest.raises(InvalidInputError, match=r"chat\.jsonl have no text of the assistant, so nothing would be"):
            encode_conversations(tokenizer_with(template), tmp_path / "chat.jsonl", tmp_path / "chat.bin")
    assert [path.name for path in tmp_path.iterdir()] == ["chat.jsonl"]


def test_the_script_encodes_conversations(tmp_path, monkeypatch, capsys):
    tokenizer_with(None).save(tmp_path / "tokenizer")
    (tmp_path / "chat.jsonl").write_text(json.dumps({"messages": messages_of(CONVERSATIONS[0])}) + "\n")
    inputs: list[Path] = [tmp_path / "chat.jsonl", tmp_path / "chat.bin"]
    run_script(monkeypatch, "encode", "--chat", *inputs, "--tokenizer", tmp_path / "tokenizer")
    assert "learned  7 tokens, those of the assistant" in capsys.readouterr().out
    assert open_mask(open_tokens(tmp_path / "chat.bin")) is not None
    run_script(monkeypatch, "encode", "--chat", inputs[0], tmp_path / "f", "--tokenizer", tmp_path / "tokenizer")
    assert "learned  7 tokens, those of the assistant" in capsys.readouterr().out
