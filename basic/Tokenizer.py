"""The tokenizer: text to ids and back, with the merges that `basic.train_bpe` learns, or those of GPT-2.

The plain path of `Tokenizer.encode` is: split the text (`basic.pretokenization`), then apply the merges to each
pre-token (`basic.bpe.plain`). Compiled kernels do the same faster; `Tokenizer.kernel_encoder` decides.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import cached_property, partial
from itertools import accumulate, chain, pairwise
from typing import Any, Literal, overload

import numpy as np
import numpy.typing as npt

from basic.bpe.arrays import MAX_VOCAB_SIZE, InvalidByteError
from basic.bpe.compiled import KernelEncoder
from basic.bpe.patterns.tables import automaton_of
from basic.bpe.plain import PretokenCache, is_pair_of_bytes, merge_rules, rules_of_ranks
from basic.bpe.spans import Encoding, find_spans
from basic.bytes_utils import decode_blocks, invalid_byte_error, load_merges, load_vocab
from basic.common.arguments import check_errors_option, check_integer, check_text_list, describe
from basic.common.errors import InvalidInputError
from basic.common.progress import resolve_num_threads
from basic.pretokenization import (
    GPT2_PATTERN,
    Pattern,
    SpecialTokens,
    chunks_of_array,
    divide_stream,
    join_strings,
    pretokenize,
    pretokenize_stream,
    replace_surrogates,
    replace_surrogates_in_stream,
    resolve_pattern,
)
from basic.tokenizer_files.content import ChatTemplate, TokenizerContent, TokenizerSettings
from basic.tokenizer_files.equivalent_merges import UsedMerges, missing_bytes, used_merges
from basic.tokenizer_files.normalization import UNICODE_VERSION, TextChanges
from basic.tokenizer_files.opening import read_tokenizer
from basic.tokenizer_files.our_folder import damaged_folder, write_folder
from basic.tokenizer_files.vocabulary import Vocabulary
from basic.tokens.info import token_dtype

__all__ = ["Tokenizer"]

_NO_SPECIALS = SpecialTokens(())

# In the plain path a longer text is streamed, so that the list of all its pre-tokens never exists.
_MAX_COMPLETE_CHARACTERS = 1 << 14


class Tokenizer(Vocabulary):
    """Byte-pair encoding over bytes, with special tokens.

    A text is split at its special tokens, then into pre-tokens. In each pre-token, the merge with the lowest rank (the
    one that comes first in `merges`) is applied at all its positions, until no merge applies.

    Args:
        vocab: id to bytes; any ids >= 0, with or without gaps; not modified. If several ids have the same bytes, the
            smallest is used to encode.
        merges: pairs of tokens, the lowest rank first; of two equal merges the first one counts. None: the ids are
            ranks, as for tiktoken: the two neighbours whose joined bytes have the lowest id are merged, and a pre-token
            that is a token is not split.
        special_tokens: strings that become one token each and are never split; if several start at the same position,
            the longest is used. One whose bytes are in the vocabulary has that id; the others get the ids after the
            largest, in the order given, or those of a dictionary.
        pattern: finds the pre-tokens: the name of a published pattern ("cl100k", "llama3", ...), a regular expression,
            or a `Pattern` (see `basic.pretokenization.resolve_pattern`). The default is GPT-2's.
        settings: what tokenizers of other programs do beside this: normalisation, a template, ...
        kernels: True uses the kernels for every text, False never. By default all but the shortest texts use them if
            they are compiled; if not, only a large text waits for the compiler. The ids are the same.

    Attributes:
        vocab: id to bytes, with the special tokens.
        settings: as given.
        special_tokens: the special tokens, prepared for the search.
        special_token_ids: special token to id, in the order given.
        compiled_pattern: the pattern, in the spelling of `PATTERNS` if it is known.
        vocab_size: the largest id plus one, the number of rows that an embedding of these ids needs.

    Raises:
        TypeError: an argument has the wrong type.
        InvalidInputError: an id is negative, a special token is empty or given twice or cannot have its id, the pattern
            is invalid, a merge needs a token that is not in the vocabulary, or two tokens of ranks are equal.
    """

    def __init__(
        self,
        vocab: dict[int, bytes],
        merges: Iterable[tuple[bytes, bytes]] | None,
        special_tokens: Iterable[str] | Mapping[str, int] | None = None,
        *,
        pattern: str | Pattern | None = None,
        settings: TokenizerSettings | None = None,
        kernels: bool | None = None,
        chat_template: ChatTemplate | None = None,
    ) -> None:
        self.special_tokens = SpecialTokens(special_tokens)
        self.compiled_pattern = resolve_pattern(pattern)
        self.kernels = kernels
        self.settings = settings or TokenizerSettings()
        self.chat_template = chat_template
        self.vocab = dict(vocab)
        self._merges = None if merges is None else list(merges)
        if not {*map(type, self.vocab)} <= {int} or not {*map(type, self.vocab.values())} <= {bytes}:
            for token_id, token in self.vocab.items():
                if not isinstance(token_id, int) or not isinstance(token, bytes):
                    raise TypeError(f"vocab must map ints to bytes, but has {token_id!r}: {token!r}")
        if (smallest := min(self.vocab, default=0)) < 0:
            raise InvalidInputError(f"vocab has the id {smallest}; ids must be at least 0")
        ids = self._ids_of_tokens
        self._set_rules(ids)
        self._missing_bytes = missing_bytes(ids)
        self.special_token_ids: dict[str, int] = {}
        next_id = max(self.vocab, default=-1) + 1
        for special_token in self.special_tokens.tokens:
            token = special_token.encode()
            token_id = ids.get(token, next_id)
            if isinstance(special_tokens, Mapping):
                token_id = check_integer(f"the id of special token {special_token!r}", special_tokens[special_token])
                if token_id < 0:
                    raise InvalidInputError(f"special token {special_token!r} has the id {token_id}, which is negative")
            if ids.setdefault(token, token_id) != token_id or self.vocab.setdefault(token_id, token) != token:
                raise InvalidInputError(
                    f"special token {special_token!r} cannot have the id {token_id!r}: the token has another id, or "
                    "the id another token"
                )
            next_id = max(next_id, token_id + 1)
            self.special_token_ids[special_token] = token_id
        self.vocab_size = max(self.vocab, default=-1) + 1
        self._changes: dict[tuple[bool, str], TextChanges] = {}
        self._always_changes = self.changes_text("strict")
        self._kernel_encoder: KernelEncoder | None = None

    def _set_rules(self, ids: dict[bytes, int]) -> None:
        if self._merges is None:
            if len(ids) < len(self.vocab):
                token = next(token for token_id, token in self.vocab.items() if ids[token] != token_id)
                raise InvalidInputError(f"the token {token!r} has several ids, but it can have only one rank")
            self.settings = replace(self.settings, ignore_merges=True, one_merge_at_a_time=True)
            rules = rules_of_ranks(dict(ids), dict(self.vocab))
        else:
            try:
                rules = merge_rules(ids, self._merges)
            except ValueError as error:
                raise InvalidInputError(str(error)) from None
            rules = rules._replace(one_at_a_time=self.settings.one_merge_at_a_time)
        if self.settings.ignore_merges:
            whole_tokens = rules.whole_tokens or dict(ids)
            if special := {token.encode() for token in self.special_tokens.tokens} & whole_tokens.keys():
                whole_tokens = {token: token_id for token, token_id in ids.items() if token not in special}
            rules = rules._replace(whole_tokens=whole_tokens)
        self._rules, self._cache = rules, PretokenCache(rules)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_kernel_encoder": None}

    def __repr__(self) -> str:
        special = list(self.special_token_ids)
        more = f" and {len(special) - 4} more" if len(special) > 5 else ""
        return (
            f"Tokenizer(vocab_size={self.vocab_size}, "
            f"{'ranks' if self._merges is None else f'merges={len(self._merges)}'}, "
            f"pattern={self.compiled_pattern.name or self.pattern!r}, "
            f"special_tokens={special[:4] if more else special}{more}"
            f"{(self.settings.normalizer and f', normalizer=NFC of Unicode {UNICODE_VERSION}') or ''})"
        )

    @cached_property
    def skipped_ids(self) -> frozenset[int]:
        """The ids that are left out where special tokens are skipped."""
        special = self.special_token_ids.items()
        return frozenset(token_id for token, token_id in special if self.settings.flag(token, "special"))

    def with_special_tokens(self, special_tokens: Iterable[str]) -> Tokenizer:
        """Return a tokenizer with further special tokens, after its own; those that it has already stay as they are.

        One whose bytes are not in the vocabulary gets the next id after the largest.
        """
        new = SpecialTokens(special_tokens).tokens
        return self._extended([], [token for token in new if token not in self.special_token_ids])

    def with_merges(self, merges: Iterable[tuple[bytes, bytes]]) -> Tokenizer:
        """Return a tokenizer with further merges, after its own, such as those of `basic.train_bpe.learn_more_merges`.

        A token that is not in the vocabulary gets the next id after the largest. All other ids stay.

        Raises:
            TypeError: a merge is not a pair of bytes.
            InvalidInputError: a merge needs a token that is not in the vocabulary.
        """
        return self._extended(list(merges), [])

    def _extended(self, merges: list[tuple[bytes, bytes]], special_tokens: list[str]) -> Tokenizer:
        tokens = set(self.vocab.values())
        made = [left + right for left, right in filter(is_pair_of_bytes, merges)]  # the others are refused below
        new = [token for token in dict.fromkeys(made) if token not in tokens]
        return Tokenizer(
            {**self.vocab, **dict(enumerate(new, self.vocab_size))},
            [*self.merges, *merges],
            [*self.special_token_ids, *special_tokens],
            pattern=self.pattern,
            settings=self.settings,
            kernels=self.kernels,
            chat_template=self.chat_template,
        )

    @property
    def merges(self) -> list[tuple[bytes, bytes]]:
        """The merges as given; for ranks, the merges that they are equivalent to (`TokenizerSettings` has the rest)."""
        return self.used_merges.merges if self._merges is None else self._merges

    @cached_property
    def used_merges(self) -> UsedMerges:
        """The merges that can be applied in a text, and the tokens that they do not produce."""
        # To merge tokens that are all different takes longer than text of their length.
        encoder = self.kernel_encoder(8 * sum(map(len, self.vocab.values())))
        try:
            used = used_merges(self._rules, self.vocab, None if encoder is None else encoder.last_merges)
        except OverflowError:  # a token is too long for the kernels
            used = used_merges(self._rules, self.vocab)
        special = {token.encode() for token in self.special_tokens.tokens}
        return used._replace(unmade=[token for token in used.unmade if token not in special])

    @cached_property
    def _decisive_settings(self) -> TokenizerSettings:
        """The settings without those that make no difference for this vocabulary and these merges."""
        settings = self.settings
        if settings.ignore_merges and not self.used_merges.unmade:
            settings = replace(settings, ignore_merges=False)
        if settings.one_merge_at_a_time and self.used_merges.early is None:
            settings = replace(settings, one_merge_at_a_time=False)
        return settings

    @property
    def pattern(self) -> str | Pattern | None:
        """The pattern that finds the pre-tokens: None for GPT-2's, one regular expression, or a Pattern of several."""
        if self.compiled_pattern == GPT2_PATTERN:
            return None
        short_form = self.compiled_pattern.short_form
        return short_form if isinstance(short_form, str) else self.compiled_pattern

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 (hexadecimal) of everything that determines the ids of a text; saving and loading keep it."""
        # JSON, written by hand because it is four times as fast: the ids, and the bytes of all tokens as hexadecimals.
        vocab = ", ".join([f'[{token_id}, "{self.vocab[token_id].hex()}"]' for token_id in sorted(self.vocab)])
        merges = ", ".join([f'["{left.hex()}", "{right.hex()}"]' for left, right in self.merges])
        rest: list[Any] = [sorted(self.special_token_ids.items())]
        if self.pattern is not None:
            rest.extend(self.compiled_pattern.splits)
        if settings := self._decisive_settings.that_change_ids():
            rest.append(settings)
        return hashlib.sha256(f"[[{vocab}], [{merges}], {json.dumps(rest)[1:]}".encode()).hexdigest()

    @overload
    def encode(
        self,
        text: str,
        *,
        specials_as_text: bool = False,
        offsets: Literal[False] = False,
        template: bool = False,
        errors: str = "strict",
    ) -> list[int]: ...

    @overload
    def encode(self, text: str, *, specials_as_text: bool = False, offsets: Literal[True]) -> Encoding: ...

    def encode(
        self,
        text: str,
        *,
        specials_as_text: bool = False,
        offsets: bool = False,
        template: bool = False,
        errors: str = "strict",
    ) -> list[int] | Encoding:
        """Encode a text. Lone surrogates, which have no UTF-8 form, are encoded as U+FFFD.

        Args:
            text: of any length.
            specials_as_text: whether special tokens in the text are ordinary text.
            offsets: whether to return an `Encoding`, which also says where each token is in the text.
            template: whether to add the tokens that the tokenizer's file has for the beginning and the end of a text
                (BOS, EOS); trained tokenizers have none.
            errors: for characters with a byte that has no token: "strict" raises, "replace" encodes U+FFFD.

        Raises:
            TypeError: `text` is not a string.
            InvalidInputError: a byte of the text has no token, the tokens are not the text (`offsets`), or an option is
                invalid.
        """
        if offsets:
            if template or errors != "strict":
                raise InvalidInputError("offsets=True cannot be combined with template=True or errors='replace'")
            return self._encode_with_spans(text, specials_as_text)
        if template:
            before, after = self.settings.template()
            return [*before, *self.encode(text, specials_as_text=specials_as_text, errors=errors), *after]
        if self._always_changes or errors != "strict":
            _check_text(text)
            text = self._text_changes(specials_as_text, errors).apply(replace_surrogates(text))
        elif self._kernel_encoder is not None and not specials_as_text:
            try:
                ids = self._kernel_encoder.strings.encode(text)
                if type(ids) is list:
                    return ids
                self._kernel_encoder.replace_strings(ids)
            except (TypeError, UnicodeEncodeError):  # raised or handled below
                pass
        _check_text(text)
        if (length := len(text)) > 0 and (encoder := self.kernel_encoder(length)) is not None:
            data = np.frombuffer(_utf8(text), np.uint8)
            try:
                return encoder.encode_list(data, specials_as_text)
            except InvalidByteError as error:
                raise _named_error("text", data, error) from None
        text = replace_surrogates(text)
        if length > _MAX_COMPLETE_CHARACTERS:
            return list(chain.from_iterable(self._encode_plain([text], specials_as_text)))
        return self._encode_complete(text, specials_as_text)

    def _encode_with_spans(self, text: str, specials_as_text: bool) -> Encoding:
        ids = self.encode(text, specials_as_text=specials_as_text)
        tokens, changed, origins = [self.vocab[token_id] for token_id in ids], _utf8(text), None
        if changes := self._text_changes(specials_as_text, "strict"):
            origins, changed = changes.origins(changed.decode()), changes.apply(changed.decode()).encode()
        if (changes and origins is None) or b"".join(tokens) != changed:
            raise InvalidInputError(
                "this tokenizer changes the text before it is split into tokens (it strips white space), so the tokens "
                "have no exact places in the text; encode without offsets"
            )
        return Encoding(ids, *find_spans(text, changed, list(map(len, tokens)), origins))

    def encode_array(
        self,
        data: str | bytes | bytearray | memoryview | npt.NDArray[np.uint8],
        *,
        num_threads: int | None = None,
        errors: str = "strict",
        specials_as_text: bool = False,
    ) -> np.ndarray:
        """Encode a text to an array, much faster than to a list.

        Args:
            data: the text, or its UTF-8 bytes.
            num_threads: by default one for each processor that this process may use; the result is the same.
            errors: "strict" raises; "replace" encodes bytes that are not UTF-8, and characters with a byte that has no
                token, as U+FFFD.
            specials_as_text: whether special tokens in the text are ordinary text.

        Returns:
            uint16 if all ids of the vocabulary fit, else uint32.

        Raises:
            TypeError: `data` has another type.
            InvalidInputError: a byte is not UTF-8 or has no token, or an option is invalid.
        """
        check_errors_option(errors)
        num_threads = resolve_num_threads(num_threads)
        array = np.frombuffer(_utf8(data), np.uint8) if isinstance(data, str) else _readonly_bytes(data)
        if changes := self._text_changes(specials_as_text, errors):
            text = changes.apply_to_stream(decode_blocks([array.tobytes()], "data", errors=errors))
            array = np.frombuffer("".join(text).encode(), np.uint8)
        if (encoder := self.kernel_encoder(len(array))) is None:
            text = decode_blocks([array.tobytes()], "data", errors=errors)
            ids = chain.from_iterable(self._encode_plain(text, specials_as_text))
            return np.fromiter(ids, token_dtype(max(self.vocab_size, 1)))
        special = self.active_special_tokens(specials_as_text)
        chunks = chunks_of_array(array, special, len(array) // num_threads + 1, self.compiled_pattern)
        try:
            arrays = [ids for ids, _ in encoder.encode_chunks(chunks, specials_as_text, num_threads, errors=errors)]
        except InvalidByteError as error:
            raise _named_error("data", array, error) from None
        return arrays[0] if len(arrays) == 1 else _join_arrays(arrays, encoder.dtype, num_threads)

    @overload
    def encode_batch(
        self,
        texts: Iterable[str],
        *,
        num_threads: int | None = None,
        specials_as_text: bool = False,
        offsets: Literal[False] = False,
        template: bool = False,
        errors: str = "strict",
    ) -> list[list[int]]: ...

    @overload
    def encode_batch(
        self,
        texts: Iterable[str],
        *,
        num_threads: int | None = None,
        specials_as_text: bool = False,
        offsets: Literal[True],
    ) -> list[Encoding]: ...

    def encode_batch(
        self, texts: Iterable[str], *, num_threads: int | None = None, **options: Any
    ) -> list[list[int]] | list[Encoding]:
        """Encode each of several texts as `encode` does; with kernels, in threads.

        Args:
            num_threads: see `encode_array`.
            options: those of `encode`.

        Raises:
            TypeError: `texts` is a single text, or one of them is not a string.
            InvalidInputError: as for `encode`.
        """
        texts, num_threads = check_text_list("texts", texts), resolve_num_threads(num_threads)
        encode: Any = partial(self.encode, **options)
        try:
            num_characters = sum(map(len, texts))
        except TypeError:  # of what is not a string; `encode` has a better message
            num_characters = 0
        if self.kernel_encoder(num_characters) is None or num_threads == 1 or len(texts) < 2:
            return list(map(encode, texts))
        with ThreadPoolExecutor(num_threads) as executor:
            # Eight groups a thread: large enough to save overhead, small enough to share the work equally.
            size = -(-len(texts) // (8 * num_threads))
            groups = [texts[start : start + size] for start in range(0, len(texts), size)]
            return list(chain.from_iterable(executor.map(lambda group: list(map(encode, group)), groups)))

    def encode_iterable(
        self, iterable: Iterable[str], *, specials_as_text: bool = False, errors: str = "strict"
    ) -> Iterator[int]:
        """Encode a stream of strings (the lines of an open file, for example) lazily.

        The ids are those of the joined text. Memory is bounded by the longest string, the
        longest pre-token and a cache of fixed size.

        Raises:
            TypeError: an item is not a string.
            InvalidInputError: a byte of the text has no token.
        """
        return chain.from_iterable(self.encode_stream(iterable, specials_as_text=specials_as_text, errors=errors))

    def encode_stream(
        self, texts: Iterable[str], *, specials_as_text: bool = False, errors: str = "strict"
    ) -> Iterator[list[int]]:
        """As `encode_iterable`, but yields lists: the ids of some pre-tokens at a time."""
        if not isinstance(texts, Iterable):
            raise TypeError(f"the texts must be an iterable of strings, got {describe(texts)}")
        encoder = self.kernel_encoder(0)
        # A call of a kernel has a cost; the plain path, which is also for little memory, reads no further than it must.
        texts = replace_surrogates_in_stream(texts if encoder is None else join_strings(texts))
        if changes := self._text_changes(specials_as_text, errors):
            texts = changes.apply_to_stream(texts)
        if encoder is None:
            return self._encode_plain(texts, specials_as_text)
        return self._encode_with_kernels(encoder, texts, specials_as_text)

    def _encode_with_kernels(
        self, encoder: KernelEncoder, texts: Iterable[str], specials_as_text: bool
    ) -> Iterator[list[int]]:
        special = self.active_special_tokens(specials_as_text)
        start = 0
        with encoder.stream_encoder(specials_as_text) as encode:
            for text in divide_stream(texts, special, self.compiled_pattern):
                data = np.frombuffer(text.encode(), np.uint8)
                try:
                    yield encode(data)
                except InvalidByteError as error:
                    raise _named_error("text", data, error, start) from None
                start += len(data)

    def _encode_plain(self, texts: Iterable[str], specials_as_text: bool) -> Iterator[list[int]]:
        special = self.active_special_tokens(specials_as_text)
        return self._encode_batches(pretokenize_stream(texts, special, self.compiled_pattern))

    def encode_documents(self, texts: Iterable[str], separator: str, *, errors: str = "strict") -> Iterator[list[int]]:
        """As `encode_stream`, for documents with the mark of a separator between them (`SpecialTokens.document_mark`).

        Special tokens inside the documents are text.
        """
        mark = SpecialTokens.document_mark(separator)
        if changes := self.text_changes(mark, errors):
            texts = changes.apply_to_stream(texts)
        batches = pretokenize_stream(texts, mark, self.compiled_pattern)
        return self._encode_batches((pretokens, special and separator) for pretokens, special in batches)

    def _encode_complete(self, text: str, specials_as_text: bool) -> list[int]:
        """Encode a short text without surrogates in the plain path."""
        special = self.active_special_tokens(specials_as_text)
        if self.compiled_pattern is GPT2_PATTERN and not special.pattern.search(text):
            # A text that is equal to a pre-token of this pattern is split into this pre-token only.
            if (ids := self._cache.get(text)) is not None:
                return list(ids)
            return self._encode_pretokens(GPT2_PATTERN.find(text))
        return list(chain.from_iterable(self._encode_batches(pretokenize(text, special, self.compiled_pattern))))

    def _encode_batches(self, batches: Iterable[tuple[list[str], str | None]]) -> Iterator[list[int]]:
        offset = 0
        for pretokens, special_token in batches:
            ids = self._encode_pretokens(pretokens, offset)
            if special_token is not None:
                ids.append(self.special_token_ids[special_token])
            yield ids
            if self._missing_bytes:  # otherwise no error needs the offset
                offset += sum(len(text.encode()) for text in (*pretokens, special_token or ""))

    def _encode_pretokens(self, pretokens: list[str], offset: int = 0) -> list[int]:
        try:
            return self._cache.encode(pretokens)
        except InvalidByteError as error:
            data = np.frombuffer("".join(pretokens).encode(), np.uint8)
            raise _named_error("text", data, error, offset) from None
        except ValueError as error:
            raise InvalidInputError(str(error)) from None

    def changes_text(self, errors: str = "strict") -> bool:
        """Whether a text may be changed before it is split, so that the tokens are not the text."""
        return bool(self._text_changes(False, errors))

    def _text_changes(self, specials_as_text: bool, errors: str) -> TextChanges:
        """How a text is changed before it is split; false if it is not."""
        check_errors_option(errors)
        key = specials_as_text, errors
        if key not in self._changes:
            self._changes[key] = self.text_changes(self.active_special_tokens(specials_as_text), errors)
        return self._changes[key]

    def text_changes(self, special_tokens: SpecialTokens, errors: str) -> TextChanges:
        """How a text is changed before it is split at special tokens; false if it is not.

        Args:
            errors: whether characters with a byte that has no token are replaced ("strict" or "replace").
        """
        return TextChanges(special_tokens, self.settings, self._missing_bytes if errors == "replace" else b"")

    def active_special_tokens(self, specials_as_text: bool) -> SpecialTokens:
        """The special tokens at which a text is split; none if they are ordinary text."""
        return _NO_SPECIALS if specials_as_text else self.special_tokens

    def kernel_encoder(self, num_bytes: int, num_mapped_bytes: int = 0) -> KernelEncoder | None:
        """Choose between kernels and the plain path.

        Args:
            num_bytes: of the text; 0 for a stream of unknown length.
            num_mapped_bytes: address space that reading the text will need.

        Returns:
            The encoder that uses the kernels, or None for the plain path.
        """
        if not self.may_use_kernels(num_bytes, num_mapped_bytes):
            return None
        if self._kernel_encoder is None:
            automaton = automaton_of(self.compiled_pattern.splits)
            if automaton is None or max(self.vocab_size, len(self._rules.results)) >= MAX_VOCAB_SIZE:
                return None
            self._kernel_encoder = KernelEncoder(
                self._rules,
                automaton,
                [(token, self.special_token_ids[token.decode()]) for token in self.special_tokens.longest_first_bytes],
                token_dtype(max(self.vocab_size, 1)),
            )
        return self._kernel_encoder

    @classmethod
    def from_files(
        cls,
        vocab_filepath: str | os.PathLike,
        merges_filepath: str | os.PathLike,
        special_tokens: Iterable[str] | None = None,
        *,
        pattern: str | Pattern | None = None,
        kernels: bool | None = None,
    ) -> Tokenizer:
        """Read a tokenizer from GPT-2's two files, `vocab.json` and `merges.txt`.

        Raises:
            DamagedFileError: a file is damaged; the message has the line.
            InvalidInputError: the files do not belong together, or another argument is invalid.
            OSError: a file cannot be read.
        """
        vocab, merges = load_vocab(vocab_filepath), load_merges(merges_filepath)
        tokenizer = cls(vocab, merges, special_tokens, pattern=pattern, kernels=kernels)
        tokenizer.kernel_encoder(0)  # now, so that the first text does not wait for it
        return tokenizer

    def content(self) -> TokenizerContent:
        """The parts of the tokenizer, as they are written to files."""
        return TokenizerContent(
            vocab=self.vocab,
            merges=self.merges,
            special_tokens=self.special_token_ids,
            pattern=self.compiled_pattern,
            settings=self.settings,
            chat_template=self.chat_template,
        )

    def save(self, directory: str | os.PathLike) -> None:
        """Write the tokenizer to a folder, which is created if needed (see `basic.tokenizer_files.our_folder`).

        The files replace those of another saved tokenizer, all at once: after an error the old tokenizer is there,
        whole. Other files in the folder stay.

        Raises:
            FileExistsError: the folder has files of these names that are not a saved tokenizer.
            OSError: a file cannot be written.
        """
        write_folder(replace(self.content(), settings=self._decisive_settings), directory)

    @classmethod
    def load(cls, path: str | os.PathLike, *, pattern: str | Pattern | None = None) -> Tokenizer:
        """Read a tokenizer of any kind. The ids are exactly those of the program that it is from.

        - A folder that `save` wrote.
        - A `tokenizer.json` with byte-level BPE, or a folder with it; also one with only `vocab.json` and `merges.txt`.
        - A rank file of tiktoken (`*.tiktoken`, Llama 3's `tokenizer.model`). As for tiktoken, there is no
          normalisation; Qwen's tokenizers bring a text to NFC first, which their tokenizer.json says.

        Args:
            pattern: for a rank file, which does not say how a text is split: "cl100k", "o200k", "llama3", "qwen2" or
                another name of `basic.pretokenization.PATTERNS`, a regular expression, or a `Pattern`. Not needed for
                the published files of these tokenizers, which are known, with their special tokens.

        Raises:
            FileNotFoundError: there is no tokenizer.
            DamagedFileError: a file is damaged or was changed (the message says how to accept it), or the files do not
                belong together.
            InvalidInputError: the file has something that is not supported (the message has its name), or the pattern
                is not known.
            OSError: a file is missing or cannot be read.
        """
        content, is_ours = read_tokenizer(path, pattern=pattern)
        try:
            tokenizer = cls.from_content(content)
        except (InvalidInputError, TypeError) as error:
            if is_ours:
                raise damaged_folder(path, error) from error
            raise InvalidInputError(f"{os.fspath(path)!r}: {error}") from error
        if is_ours:
            tokenizer._decisive_settings = content.settings  # saving has left out the others
        tokenizer.kernel_encoder(0)  # now, so that the first text does not wait for it
        return tokenizer

    @classmethod
    def from_content(cls, content: TokenizerContent) -> Tokenizer:
        """Make a tokenizer of the parts that a file has.

        Raises:
            TypeError, InvalidInputError: as for `Tokenizer`.
        """
        return cls(
            content.vocab,
            content.merges,
            content.special_tokens,
            pattern=content.pattern,
            settings=content.settings,
            chat_template=content.chat_template,
        )


def _join_arrays(arrays: list[np.ndarray], dtype: np.dtype, num_threads: int) -> np.ndarray:
    """Concatenate arrays; in threads, because the system has to clear the memory of the result."""
    ends = list(accumulate(map(len, arrays), initial=0))
    result = np.empty(ends[-1], dtype)
    with ThreadPoolExecutor(num_threads) as executor:
        list(executor.map(np.copyto, [result[start:stop] for start, stop in pairwise(ends)], arrays))
    return result


def _check_text(text: object) -> None:
    if not isinstance(text, str):
        raise TypeError(f"text must be a string, got {type(text).__name__}: {text!r:.80}")


def _utf8(text: str) -> bytes:
    try:
        return text.encode()
    except UnicodeEncodeError:
        return replace_surrogates(text).encode()


def _named_error(name: str, data: np.ndarray, error: InvalidByteError, start: int = 0) -> InvalidInputError:
    """The error for the user; `start` is the offset of the data in the text."""
    limit = error.max_pretoken_bytes
    return invalid_byte_error(
        name, data, error.offset, start + error.offset, lacks_token=error.lacks_token, max_pretoken_bytes=limit
    )


def _readonly_bytes(data: bytes | bytearray | memoryview | npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    if not isinstance(data, bytes | bytearray | memoryview | np.ndarray):
        raise TypeError(f"data must be a string, bytes or a uint8 array, got {type(data).__name__}: {data!r:.80}")
    if isinstance(data, np.ndarray) and (data.dtype != np.uint8 or data.ndim != 1):
        raise TypeError(f"an array of text must be one-dimensional uint8, got {data.dtype} of shape {data.shape}")
    array = np.frombuffer(np.ascontiguousarray(data) if isinstance(data, np.ndarray) else data, np.uint8)
    array.flags.writeable = False
    return array
