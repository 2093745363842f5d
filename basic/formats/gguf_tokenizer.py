"""The tokenizer in a GGUF file: byte-level BPE, which llama.cpp calls "gpt2", with the name of its pre-tokenizer."""

from __future__ import annotations

from typing import Any

from basic.bytes_utils import from_printable, to_printable
from basic.common.errors import DamagedFileError, InvalidInputError
from basic.pretokenization import resolve_pattern
from basic.Tokenizer import Tokenizer
from basic.tokenizer_files.content import ChatTemplate, TokenizerContent, TokenizerSettings
from basic.tokenizer_files.equivalent_merges import check_all_bytes, missing_bytes
from basic.tokenizer_files.our_folder import parse_chat_template

# Names of tokenizer.ggml.pre with the same regular expressions in llama.cpp, by our name of the pattern; the first is
# written. Those of IGNORE_MERGES take a pre-token that is in the vocabulary as one token.
_PRE_TOKENIZERS = {
    "gpt2": ("gpt-2", "mpt", "olmo", "jais", "trillion"),
    "llama3": ("dbrx", "smaug-bpe", "llama-bpe", "llama3", "llama-v3", "falcon3"),
    "qwen2": ("qwen2", "deepseek-r1-qwen"),
    "starcoder": ("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"),
    "o200k": ("gpt-4o", "llama4"),
    "deepseek": ("deepseek-v3",),
}
_IGNORE_MERGES = ("llama-bpe", "llama3", "llama-v3", "falcon3")
_NFC = ("qwen2", "deepseek-r1-qwen")  # their tokenizers normalize; llama.cpp leaves this out

# Values of tokenizer.ggml.token_type.
_NORMAL, _CONTROL, _USER_DEFINED, _UNUSED = 1, 3, 4, 5


def read_gguf_tokenizer(fields: dict[str, Any]) -> Tokenizer:
    """The tokenizer that the fields of a file describe.

    Raises:
        DamagedFileError: a field is missing or damaged.
        InvalidInputError: our tokenizer cannot represent it; the message names the field and its value.
    """
    if (kind := fields.get("tokenizer.ggml.model")) != "gpt2":
        raise InvalidInputError(
            f"tokenizer.ggml.model is {kind!r}; only 'gpt2' (byte-level BPE) can be read; import the model without its "
            "tokenizer"
        )
    pre = fields.get("tokenizer.ggml.pre")
    patterns = [name for name, names in _PRE_TOKENIZERS.items() if pre in names]
    if not patterns:
        known = ", ".join(name for names in _PRE_TOKENIZERS.values() for name in names)
        raise InvalidInputError(f"tokenizer.ggml.pre is {pre!r}; only {known} can be read")
    try:
        tokens, kinds = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"]
        merges = [merge.split(" ") for merge in fields["tokenizer.ggml.merges"]]
        special = {tokens[i]: i for i, kind in enumerate(kinds) if kind in (_CONTROL, _USER_DEFINED)}
        vocab = {i: from_printable(tokens[i]) for i, kind in enumerate(kinds) if kind == _NORMAL}
        vocab |= {i: token.encode() for token, i in special.items()}
        content = TokenizerContent(
            vocab=vocab,
            merges=[(from_printable(left), from_printable(right)) for left, right in merges],
            special_tokens=special,
            pattern=patterns[0],
            settings=TokenizerSettings(
                normalizer="NFC" if pre in _NFC else None,
                ignore_merges=pre in _IGNORE_MERGES,
                one_merge_at_a_time=True,
                flags={token: {"special": False} for token, i in special.items() if kinds[i] == _USER_DEFINED},
                post_processor=_post_processor(fields, tokens, pre in _IGNORE_MERGES),
                missing_bytes={"unk_token": None} if missing_bytes(vocab.values()) else None,
            ),
            chat_template=_chat_template(fields, tokens),
        )
        return Tokenizer.from_content(content)
    except (KeyError, IndexError, TypeError, AttributeError, ValueError) as error:
        if isinstance(error, InvalidInputError):
            raise
        raise DamagedFileError(f"the fields tokenizer.ggml.* are not complete ({type(error).__name__}: {error})") from (
            error
        )


def _post_processor(fields: dict[str, Any], tokens: list[str], adds_bos: bool) -> dict[str, Any] | None:
    """What tokenizer.json has in place of add_bos_token and add_eos_token."""
    text: list[dict[str, Any]] = [{"Sequence": {"id": "A", "type_id": 0}}]
    ids = {}
    for name, default, before in (("bos", adds_bos, True), ("eos", False, False)):
        if fields.get(f"tokenizer.ggml.add_{name}_token", default):
            token_id = fields[f"tokenizer.ggml.{name}_token_id"]
            token = tokens[token_id]
            ids[token] = {"id": token, "ids": [token_id], "tokens": [token]}
            text.insert(0 if before else len(text), {"SpecialToken": {"id": token, "type_id": 0}})
    return {"type": "TemplateProcessing", "single": text, "pair": text, "special_tokens": ids} if ids else None


def _chat_template(fields: dict[str, Any], tokens: list[str]) -> ChatTemplate | None:
    ids = {name: fields.get(f"tokenizer.ggml.{name}_token_id") for name in ("bos", "eos")}
    named = {f"{name}_token": tokens[token_id] for name, token_id in ids.items() if token_id is not None}
    return parse_chat_template({"chat_template": fields.get("tokenizer.chat_template"), **named})


def gguf_tokenizer_fields(
    tokenizer: Tokenizer, vocab_size: int, end_of_text: str, end_of_answer: str | None = None
) -> dict[str, Any]:
    """The fields of a file that describe a tokenizer.

    Args:
        vocab_size: of the model; ids without a token become unused tokens.
        end_of_text: the special token that becomes the BOS and EOS token, if the tokenizer has it, and neither its
            post-processor nor its chat template names others.
        end_of_answer: a special token at which llama.cpp ends too.

    Raises:
        InvalidInputError: llama.cpp would give other ids; the message has the reason.
    """
    content, settings = tokenizer.content(), tokenizer.settings
    if settings.missing_bytes is None:
        check_all_bytes(content.vocab.values(), "the vocabulary")
    tokenizer.used_merges.check_order()
    if content.merges is None:
        raise InvalidInputError("llama.cpp needs merges, but this tokenizer has ranks (it is from a rank file)")
    if not content.merges:
        raise InvalidInputError("llama.cpp needs merges, but this tokenizer has none; export the model without it")
    pre_tokenizer = _pre_tokenizer_name(tokenizer)
    template = settings.template()
    end_id, answer_id = (tokenizer.special_token_ids.get(token or "") for token in (end_of_text, end_of_answer))
    bos = template.before[0] if template.before else _named_id(tokenizer, "bos_token", end_id)
    eos = template.after[0] if template.after else _named_id(tokenizer, "eos_token", end_id)
    special = {token_id: token for token, token_id in tokenizer.special_token_ids.items()}
    tokens, kinds = [], []
    for token_id in range(vocab_size):
        if token_id in special:
            kinds.append(_CONTROL if settings.flag(special[token_id], "special") else _USER_DEFINED)
            tokens.append(special[token_id])
        elif token_id in content.vocab:
            kinds.append(_NORMAL)
            tokens.append(to_printable(content.vocab[token_id]))
        else:
            kinds.append(_UNUSED)
            tokens.append(f"[PAD{token_id}]")
    fields = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre_tokenizer,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": kinds,
        "tokenizer.ggml.merges": [f"{to_printable(left)} {to_printable(right)}" for left, right in content.merges],
        **({} if content.chat_template is None else {"tokenizer.chat_template": content.chat_template.source}),
        "tokenizer.ggml.bos_token_id": bos,
        "tokenizer.ggml.eos_token_id": eos,
        "tokenizer.ggml.eot_token_id": next((i for i in (answer_id, end_id) if i not in (None, eos)), None),
        "tokenizer.ggml.padding_token_id": end_id,
        "tokenizer.ggml.add_bos_token": bool(template.before),
        "tokenizer.ggml.add_eos_token": bool(template.after),
        "tokenizer.ggml.add_space_prefix": False,
    }
    return {name: value for name, value in fields.items() if value is not None}


def _named_id(tokenizer: Tokenizer, name: str, default: int | None) -> int | None:
    """The id of a token that the chat template names: llama.cpp gives it the BOS and EOS token of the file."""
    chat = tokenizer.chat_template
    token = chat.tokens.get(name, "") if chat is not None and name in chat.source else ""
    return tokenizer.special_token_ids.get(token, default)


def _pre_tokenizer_name(tokenizer: Tokenizer) -> str:
    """llama.cpp's name of what splits a text as this tokenizer does."""
    ignores_merges = tokenizer.settings.ignore_merges
    for pattern, names in _PRE_TOKENIZERS.items():
        fitting = [name for name in names if (name in _IGNORE_MERGES) == ignores_merges]
        if fitting and resolve_pattern(pattern) == tokenizer.compiled_pattern:
            return fitting[0]
    raise InvalidInputError(
        "llama.cpp has no pre-tokenizer that splits a text as this tokenizer's pattern does"
        f"{' and ignores merges' if ignores_merges else ''} (it has those of "
        f"{', '.join(_PRE_TOKENIZERS)}); export the model without its tokenizer"
    )
