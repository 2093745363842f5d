"""Conversations: from messages with roles to token ids of which only the assistant's are learned.

A conversation is a list of messages, {"role": "user", "content": "Hello"}. The tokenizer's chat template, Jinja as in
transformers, makes one text of it; a tokenizer without one gets the plain template of this module. Which part of the
text is the assistant's:

- what stands between {% generation %} and {% endgeneration %}, if the template has these tags;
- else, for each message of the assistant, what the template adds for it: the conversation up to it is rendered with
  the beginning of an answer (`add_generation_prompt`), and again with the message, and the first must begin the second.
  White space behind the special token that ends the answer is not learned, as generation has ended before it.

The parts are encoded apart from each other, as they are when the model answers: a prompt, then new tokens. So the
tokens that are learned are exactly the assistant's text.
"""

from __future__ import annotations

import json
import os
import re
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from basic.common.errors import InvalidInputError, how_to_install
from basic.common.outputs import reserved_outputs
from basic.common.progress import progress_bar
from basic.corpus.documents import BadLines, SkippedLines, read_lines, warn_of_skipped
from basic.corpus.shards import Shard
from basic.corpus.sources import Inputs, TextSource, expand_inputs
from basic.corpus.work_folder import Record
from basic.encoding import SavedTokenizer, ShardEncoding, encode_files, shard_record
from basic.Tokenizer import Tokenizer
from basic.tokenizer_files.content import ChatTemplate
from basic.tokens.flat_file import TokenFileWriter
from basic.tokens.info import BEGINS_DOCUMENT, IS_LEARNED, TokenFileInfo, token_file_outputs
from basic.tokens.opening import open_mask, open_tokens

__all__ = ["ChatFormat", "encode_conversations"]

Message = Mapping[str, Any]
_GENERATION_TAG = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")
_COMMENT = re.compile(r"\{#.*?#\}", re.DOTALL)


class ChatFormat:
    """How the conversations of a tokenizer become texts and ids.

    Args:
        tokenizer: with its chat template; without one, conversations are plain text with the roles as headings.

    Raises:
        InvalidInputError: the tokenizer has neither a template nor this special token, or the template is not valid.

    Examples:
        >>> ChatFormat(tokenizer).parts([{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}])
        [('User:\\nHi\\n\\nAssistant:\\n', False), ('Hello!<|endoftext|>', True), ('\\n\\n', False)]
    """

    def __init__(self, tokenizer: Tokenizer, *, end_of_text: str = "<|endoftext|>"):
        self.tokenizer = tokenizer
        template = tokenizer.chat_template
        if template is None and end_of_text not in tokenizer.special_token_ids:
            raise InvalidInputError(
                f"the tokenizer has no chat template, and the plain one needs the special token {end_of_text!r}; give "
                f"another one of its {list(tokenizer.special_token_ids)} as end_of_text"
            )
        self._has_tags = template is not None and bool(_GENERATION_TAG.search(_COMMENT.sub("", template.source)))
        self._mark = secrets.token_hex(8)  # around what {% generation %} encloses; no message can contain it by intent
        self._render = _plain_template(end_of_text) if template is None else _jinja_template(template, self._mark)

    def prompt(self, messages: Sequence[Message]) -> str:
        """The text of a conversation up to where the assistant's next answer begins.

        Raises:
            InvalidInputError: as for `parts`.
        """
        return self._text(messages, True).replace(self._mark, "")

    def fitting_prompt(self, messages: Sequence[Message], max_tokens: int) -> tuple[str, int]:
        """The prompt without the oldest questions and answers, as far as it has more than `max_tokens` tokens.

        A first message of the role "system" stays, and so does the last message.

        Returns:
            The prompt, and how many messages were left out.

        Raises:
            InvalidInputError: as for `parts`.
        """
        kept, num_first = list(messages), int(bool(messages) and messages[0].get("role") == "system")
        prompt = self.prompt(kept)
        while len(self.tokenizer.encode(prompt)) > max_tokens and len(kept) > num_first + 1:
            del kept[num_first : num_first + 2]
            prompt = self.prompt(kept)
        return prompt, len(messages) - len(kept)

    @property
    def end_of_answer(self) -> str | None:
        """The special token that ends an answer; None if the template has none."""
        example = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
        answers = [text for text, is_learned in self.parts(example) if is_learned]
        return next((token for token in self._special_tokens if answers and answers[-1].endswith(token)), None)

    def without_special_tokens(self, text: str) -> str:
        """A text as the content of a message, which may have no special tokens: a model can write any of them."""
        for token in self._special_tokens:
            text = text.replace(token, "")
        return text

    def parts(self, messages: Sequence[Message]) -> list[tuple[str, bool]]:
        """The text of a conversation in parts, each with whether it is the assistant's; joined, they are the text.

        Raises:
            InvalidInputError: a message is not one, its text has a special token in it, or the template cannot say
                which part of the text is the assistant's.
        """
        text = self._text(messages, False)
        if self._has_tags:
            return [(part, index % 2 == 1) for index, part in enumerate(text.split(self._mark)) if part]
        parts, end = [], 0
        for index, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            before, after = self._text(messages[:index], True), self._text(messages[: index + 1], False)
            if not (len(before) >= end and after.startswith(before) and text.startswith(after)):
                raise InvalidInputError(
                    f"the chat template writes message {index} in another way when others follow it, so its text "
                    "cannot be told from that of the others; put {% generation %} and {% endgeneration %} around the "
                    "answer in the template"
                )
            answer = after[len(before) :]
            if answer.rstrip().endswith(self._special_tokens):
                answer = answer.rstrip()
            parts += [(text[end : len(before)], False), (answer, True)]
            end = len(before) + len(answer)
        return [(part, is_learned) for part, is_learned in [*parts, (text[end:], False)] if part]

    def encode(self, messages: Sequence[Message]) -> tuple[np.ndarray, np.ndarray]:
        """The ids of a conversation, and their mask, uint8 (see `basic.tokens.info.mask_path`).

        Raises:
            InvalidInputError: as for `parts`.
        """
        parts = [(self.tokenizer.encode(text), is_learned) for text, is_learned in self.parts(messages)]
        ids = np.concatenate([np.empty(0, np.int64), *(part for part, _ in parts)]).astype(np.int64)
        lengths, learned = [len(part) for part, _ in parts], [is_learned * IS_LEARNED for _, is_learned in parts]
        mask = np.repeat(np.array(learned, np.uint8), np.array(lengths, np.int64))
        mask[:1] |= BEGINS_DOCUMENT
        return ids, mask

    @property
    def _special_tokens(self) -> tuple[str, ...]:
        return tuple(self.tokenizer.special_token_ids)

    def _text(self, messages: Sequence[Message], add_generation_prompt: bool) -> str:
        for index, message in enumerate(messages):
            if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
                raise InvalidInputError(f"message {index} must be an object with a role, got {message!r:.60}")
            content = message.get("content")
            if not isinstance(content, str | None):
                raise InvalidInputError(f"the content of message {index} must be a text, got {content!r:.60}")
            texts = list(_texts(message))
            if found := next((token for token in self._special_tokens for text in texts if token in text), None):
                raise InvalidInputError(
                    f"message {index} has the special token {found!r}, with which it could forge what others say; "
                    "remove it"
                )
        return self._render(messages, add_generation_prompt)


def _texts(value: Any) -> Iterator[str]:
    """All texts in a message: a template may write any of them, also its role and its keys."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for pair in value.items():
            yield from _texts(pair)
    elif isinstance(value, Sequence):
        for entry in value:
            yield from _texts(entry)


def encode_conversations(
    tokenizer: Tokenizer,
    inputs: Inputs,
    output_path: str | os.PathLike,
    *,
    end_of_text: str = "<|endoftext|>",
    on_bad_line: str = "error",
    overwrite: bool = True,
    progress: bool = False,
    **dataset: Any,
) -> tuple[TokenFileInfo, int]:
    """Encode conversations into token files with masks, in which the assistant's tokens are learned.

    Args:
        inputs: JSON lines, each an object with "messages", in any form that `basic.encoding.encode_file` takes.
        output_path: path of the token file, `*.bin`; the mask is beside it (see `basic.tokens.info.mask_path`). Another
            name is the folder of a dataset, with a token file for each input; the same call resumes it.
        on_bad_line: "error", or "skip" for leaving out lines that are no conversations.
        dataset: `executor`, `start_over` and `num_workers` of `basic.encoding.encode_files`.

    Returns:
        The contents of the sidecar or index, and how many tokens are learned.

    Raises:
        InvalidInputError: a line is no conversation; the message names it. Or no conversation of a file has a learned
            token.
        FileExistsError, BlockingIOError, DamagedFileError, OSError: as for `encode_file` and `encode_files`.
    """
    settings: dict[str, Any] = {"end_of_text": end_of_text, "on_bad_line": on_bad_line}
    if Path(output_path).suffix != ".bin" or dataset.get("executor") is not None:
        chat = tokenizer.chat_template
        template = None if chat is None else [chat.source, *sorted(chat.tokens.items())]
        work = {"kind": "conversations", "chat_template": template, **settings}
        task = partial(encode_conversation_shard, **settings)
        info = encode_files(tokenizer, inputs, output_path, progress=progress, task=task, work=work, **dataset)
        if info.count == 0:
            raise InvalidInputError("the inputs have no conversation, they are empty; give others with --start-over")
        mask = open_mask(open_tokens(output_path))
        return info, 0 if mask is None else int(np.count_nonzero(mask & IS_LEARNED))
    sources, outputs = expand_inputs(inputs), token_file_outputs(output_path, with_mask=True)
    with (
        reserved_outputs(outputs, inputs=sources, overwrite=overwrite),
        progress_bar(progress, desc="encoding", total=None, unit="B", unit_scale=True) as advance,
    ):
        info, num_learned, skipped = _write_conversations(tokenizer, sources, output_path, advance, **settings)
    warn_of_skipped([skipped.as_record()])
    return info, num_learned


def encode_conversation_shard(
    tokenizer: SavedTokenizer, encoding: ShardEncoding, shard: Shard, path: str, **settings: Any
) -> Record:
    """As `basic.encoding.encode_shard`, of conversations; the shard, a file, may be empty."""
    sources, advance = [segment.source for segment in shard], lambda num_bytes: None
    info, _, skipped = _write_conversations(tokenizer.load(), sources, path, advance, may_be_empty=True, **settings)
    return shard_record(info, skipped)


def _write_conversations(
    tokenizer: Tokenizer,
    sources: Sequence[TextSource],
    output_path: str | os.PathLike,
    advance: Callable[[int], object],
    *,
    end_of_text: str,
    on_bad_line: str,
    may_be_empty: bool = False,
) -> tuple[TokenFileInfo, int, SkippedLines]:
    """Write a token file with its mask; return its sidecar, how many tokens are learned, and what was left out."""
    chat, skipped, num_learned = ChatFormat(tokenizer, end_of_text=end_of_text), SkippedLines(), 0
    with TokenFileWriter(
        output_path, tokenizer.vocab_size, tokenizer_fingerprint=tokenizer.fingerprint, with_mask=True
    ) as writer:
        for source in sources:
            bad_lines = BadLines(skipped if on_bad_line == "skip" else None)
            with source.open_content() as file:
                for number, _, line in read_lines(file, bad_lines):
                    advance(len(line))
                    if not line.strip():
                        continue
                    try:
                        ids, mask = chat.encode(_messages(line))
                    except InvalidInputError as error:
                        bad_lines.add(InvalidInputError(f"{file.name}, line {number}: {error}"))
                        continue
                    bad_lines.has_documents = True
                    writer.write(ids, len(line), mask=mask)
                    num_learned += int((mask & IS_LEARNED).sum())
            if is_empty := file.offset == 0:
                skipped(InvalidInputError(f"{os.fspath(source)!r} is empty"))
        if num_learned == 0 and not (may_be_empty and is_empty):
            warn_of_skipped([skipped.as_record()])
            names = ", ".join(os.fspath(source) for source in sources[:3]) + ", ..." * (len(sources) > 3)
            raise InvalidInputError(
                f"the conversations of {names} have no text of the assistant, so nothing would be learned; give some "
                "with messages of the role 'assistant', which the chat template must write (between {% generation %} "
                "and {% endgeneration %} if it has these tags)"
            )
    return writer.info, num_learned, skipped


def _messages(line: bytes) -> list[Message]:
    try:
        record = json.loads(line.decode())
    except (ValueError, RecursionError) as error:
        raise InvalidInputError(f"this is not JSON in UTF-8: {error}") from None
    messages = record.get("messages") if isinstance(record, dict) else None
    if not isinstance(messages, list) or not messages:
        raise InvalidInputError(
            'a conversation must be an object {"messages": [{"role": "user", "content": "..."}, ...]}, got '
            f"{record!r:.60}"
        )
    return messages


def _plain_template(end_of_text: str) -> Callable[[Sequence[Message], bool], str]:
    """The template of a tokenizer that has none: headings, and the end of text behind each answer."""
    headings = {"system": "System", "user": "User", "assistant": "Assistant"}

    def render(messages: Sequence[Message], add_generation_prompt: bool) -> str:
        texts = []
        for index, message in enumerate(messages):
            role, content = message["role"], message.get("content")
            if role not in headings or content is None:
                raise InvalidInputError(
                    f"message {index} must have a content, and one of the roles {', '.join(headings)}, got the role "
                    f"{role!r:.40}"
                )
            texts.append(f"{headings[role]}:\n{content}{end_of_text if role == 'assistant' else ''}\n\n")
        return "".join(texts) + (f"{headings['assistant']}:\n" if add_generation_prompt else "")

    return render


def _jinja_template(template: ChatTemplate, mark: str) -> Callable[[Sequence[Message], bool], str]:
    """A template of transformers, which runs in a sandbox: it is a program of somebody else."""
    try:
        import jinja2
        import jinja2.ext
        import jinja2.nodes
        import jinja2.sandbox
    except ImportError:
        install = how_to_install("formats", "jinja2")
        raise InvalidInputError(f"the tokenizer's chat template needs jinja2; {install}") from None

    class Generation(jinja2.ext.Extension):
        """The tags around what the assistant says."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            call = self.call_method("_marked", [])
            return jinja2.nodes.CallBlock(call, [], [], body).set_lineno(line)

        def _marked(self, caller: Callable[[], str]) -> str:
            return f"{mark}{caller()}{mark}"

    def raise_exception(message: str) -> None:
        raise InvalidInputError(f"the chat template refuses this conversation: {message}")

    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = lambda value, indent=None: json.dumps(value, ensure_ascii=False, indent=indent)
    environment.globals["raise_exception"] = raise_exception  # ty: ignore[invalid-assignment]
    try:
        compiled = environment.from_string(template.source)
    except jinja2.TemplateError as error:
        raise InvalidInputError(f"the chat template is not valid: {error}") from None

    def render(messages: Sequence[Message], add_generation_prompt: bool) -> str:
        values = {**template.tokens, "messages": messages, "add_generation_prompt": add_generation_prompt}
        try:
            return compiled.render(values)
        except InvalidInputError:
            raise
        except Exception as error:  # whatever its code does with messages that it does not expect
            raise InvalidInputError(f"the chat template cannot write this conversation: {error}") from None

    return render
