"""The tokenizer: text to ids and back, with the merges that `basic.train_bpe` learns, or those of GPT-2.

The plain path of `Tokenizer.encode` is: split the text (`basic.pretokenization`), then apply the merges to each
pre-token (`basic.bpe.plain`). Compiled kernels do the same faster; `Tokenizer.kernel_encoder` decides.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import accumulate, chain, pairwise
from typing import Any, Literal, NoReturn, overload

import numpy as np
import numpy.typing as npt

from basic.bpe.arrays import MAX_VOCAB_SIZE, InvalidByteError
from basic.bpe.compiled import KernelEncoder
from basic.bpe.patterns.tables import automaton_of
from basic.bpe.spans import Encoding, find_spans
from basic.bytes_utils import decode_blocks
from basic.common.arguments import check_errors_option, check_text, check_text_list, describe
from basic.common.errors import InvalidInputError
from basic.common.progress import resolve_num_threads
from basic.pretokenization import (
    GPT2_PATTERN,
    SpecialTokens,
    chunks_of_array,
    divide_stream,
    join_strings,
    pretokenize,
    pretokenize_stream,
    replace_surrogates,
    replace_surrogates_in_stream,
)
from basic.tokenizer_files.definition import TokenizerDefinition
from basic.tokens.info import token_dtype

__all__ = ["Tokenizer"]

# In the plain path a longer text is streamed, so that the list of all its pre-tokens never exists.
_MAX_COMPLETE_CHARACTERS = 1 << 14


class Tokenizer(TokenizerDefinition):
    """Byte-pair encoding over bytes, with special tokens.

    A text is split at its special tokens, then into pre-tokens. In each pre-token, the merge with the lowest rank (the
    one that comes first in `merges`) is applied at all its positions, until no merge applies.

    Args:
        vocab: id to bytes; any ids >= 0, with or without gaps; not modified. If several ids have the same bytes, the
            smallest is used to encode.
        merges: pairs of tokens, the lowest rank first; of two equal merges the first one counts. None: the ids are
            ranks, as for tiktoken: the two neighbors whose joined bytes have the lowest id are merged, and a pre-token
            that is a token is not split.
        special_tokens: strings that become one token each and are never split; if several start at the same position,
            the longest is used. One whose bytes are in the vocabulary has that id; the others get the ids after the
            largest, in the order given, or those of a dictionary.
        pattern: finds the pre-tokens: the name of a published pattern ("cl100k", "llama3", ...), a regular expression,
            or a `Pattern` (see `basic.pretokenization.resolve_pattern`). The default is GPT-2's.
        settings: what tokenizers of other programs do beside this: normalization, a template, ...
        kernels: True uses the kernels for every text, False never. By default all but the shortest texts use them if
            they are compiled; if not, only a large text waits for the compiler. The ids are the same.

    Attributes:
        vocab: id to bytes, with the special tokens.
        special_tokens: the special tokens, prepared for the search.
        special_token_ids: special token to id, in the order given.
        compiled_pattern: the pattern, in the spelling of `PATTERNS` if it is known.
        vocab_size: the largest id plus one, the number of rows that an embedding of these ids needs.

    Raises:
        TypeError: an argument has the wrong type.
        InvalidInputError: an id is negative, a special token is empty or given twice or cannot have its id, the pattern
            is invalid, a merge needs a token that is not in the vocabulary, or two tokens of ranks are equal.
    """

    _kernel_encoder: KernelEncoder | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_kernel_encoder": None}

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
            check_text(text)
            text = self._text_changes(specials_as_text, errors).apply(replace_surrogates(text))
        elif self._kernel_encoder is not None and not specials_as_text:
            try:
                ids = self._kernel_encoder.strings.encode(text)
                if type(ids) is list:
                    return ids
                self._kernel_encoder.replace_strings(ids)
            except (TypeError, UnicodeEncodeError):  # raised or handled below
                pass
        check_text(text)
        if (length := len(text)) > 0 and (encoder := self.kernel_encoder(length)) is not None:
            data = np.frombuffer(_utf8(text), np.uint8)
            try:
                return encoder.encode_list(data, specials_as_text)
            except InvalidByteError as error:
                raise error.described("text", data) from None
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
            raise error.described("data", array) from None
        return arrays[0] if len(arrays) == 1 else _join_arrays(arrays, encoder.dtype, num_threads)

    @overload
    def encode_batch(
        self, texts: Iterable[str], *, num_threads: int | None = None, offsets: Literal[True], **options: Any
    ) -> list[Encoding]: ...

    @overload
    def encode_batch(
        self, texts: Iterable[str], *, num_threads: int | None = None, offsets: Literal[False] = False, **options: Any
    ) -> list[list[int]]: ...

    def encode_batch(
        self, texts: Iterable[str], *, num_threads: int | None = None, **options: Any
    ) -> list[list[int]] | list[Encoding]:
        """Encode each of several texts as `encode` does, whose options it has; with kernels, in threads.

        Raises:
            TypeError: `texts` is a single text, or one of them is not a string.
            InvalidInputError: as for `encode`.
        """
        texts, num_threads = check_text_list("texts", texts), resolve_num_threads(num_threads)
        encode: Any = partial(self.encode, **options)
        num_characters = sum(len(text) for text in texts if isinstance(text, str))  # `encode` raises for others
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

        The ids are those of the joined text. Memory is bounded by the longest string, the longest pre-token and a cache
        of fixed size.

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
                    raise error.described("text", data, start) from None
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
            raise error.described("text", data, offset) from None
        except ValueError as error:
            raise InvalidInputError(str(error)) from None

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


def _join_arrays(arrays: list[np.ndarray], dtype: np.dtype, num_threads: int) -> np.ndarray:
    """Concatenate arrays; in threads, because the system has to clear the memory of the result."""
    ends = list(accumulate(map(len, arrays), initial=0))
    result = np.empty(ends[-1], dtype)
    with ThreadPoolExecutor(num_threads) as executor:
        list(executor.map(np.copyto, [result[start:stop] for start, stop in pairwise(ends)], arrays))
    return result


def _utf8(text: str) -> bytes:
    try:
        return text.encode()
    except UnicodeEncodeError:
        return replace_surrogates(text).encode()


def _readonly_bytes(data: bytes | bytearray | memoryview | npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    if not isinstance(data, bytes | bytearray | memoryview | np.ndarray):
        raise TypeError(f"data must be a string, bytes or a uint8 array, got {type(data).__name__}: {data!r:.80}")
    if isinstance(data, np.ndarray) and (data.dtype != np.uint8 or data.ndim != 1):
        raise TypeError(f"an array of text must be one-dimensional uint8, got {data.dtype} of shape {data.shape}")
    array = np.frombuffer(np.ascontiguousarray(data) if isinstance(data, np.ndarray) else data, np.uint8)
    array.flags.writeable = False
    return array


def __getattr__(name: str) -> NoReturn:
    """`from basic import Tokenizer` gives this module instead of the class, as its first use says."""
    hint = "; the class is in it: from basic.Tokenizer import Tokenizer" if hasattr(Tokenizer, name) else ""
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}{hint}")
