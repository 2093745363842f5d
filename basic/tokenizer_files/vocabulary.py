"""The ids of a vocabulary and their bytes: the half of a tokenizer that decodes."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from basic.bpe import loading
from basic.bpe.arrays import MAX_VOCAB_SIZE
from basic.bpe.stream_decoder import StreamDecoder
from basic.common.arguments import check_integer, id_list
from basic.common.errors import InvalidInputError

if TYPE_CHECKING:
    from basic.bpe.kernels.decode import TokenBytes

# So many ids are decoded in the time in which the decoder with kernels is made.
_MIN_DECODER_IDS = 1 << 14


class Vocabulary:
    """Ids to bytes and text, and tokens by id. Compiled kernels do it faster, where they are worth it.

    Attributes:
        vocab_size: the largest id plus one, the number of rows that an embedding of these ids needs.
        kernels: True uses the kernels always, False never, None where they are worth it (see Tokenizer).
        skipped_ids: those that are left out where special tokens are skipped.
    """

    vocab: dict[int, bytes]
    vocab_size: int
    skipped_ids: frozenset[int]
    kernels: bool | None
    _token_bytes: TokenBytes | None = None

    def __getstate__(self) -> dict[str, Any]:
        # Another process makes its own decoder and, if needed, table of ids.
        return {name: value for name, value in self.__dict__.items() if name not in ("_ids_of_tokens", "_token_bytes")}

    def __len__(self) -> int:
        """The number of tokens, also of special ones. If the ids have gaps, it is less than `vocab_size`."""
        return len(self.vocab)

    def token_to_id(self, token: str | bytes) -> int | None:
        """The id of a token, given as its bytes or as its text (not in GPT-2's printable form); None if there is none.

        Of several ids of the same bytes it is the one that `encode` uses.
        """
        return self._ids_of_tokens.get(token.encode(errors="surrogatepass") if isinstance(token, str) else token)

    def id_to_token(self, token_id: int) -> bytes | None:
        """The bytes of a token, which need not be UTF-8; None if no token has this id."""
        return self.vocab.get(check_integer("token_id", token_id))

    @cached_property
    def _ids_of_tokens(self) -> dict[bytes, int]:
        return {self.vocab[token_id]: token_id for token_id in sorted(self.vocab, reverse=True)}

    def may_use_kernels(self, num_bytes: int, num_mapped_bytes: int = 0) -> bool:
        """Whether a text should use the kernels.

        Args:
            num_mapped_bytes: address space that reading the text will need.
        """
        if self.kernels is not None:
            return self.kernels
        return loading.kernels_pay_off("encoding", num_bytes, num_mapped_bytes)

    def _kernel_decoder(self, num_ids: int) -> TokenBytes | None:
        """The decoder that uses the kernels; None if it does not yet exist and so few ids do not need it."""
        if self.vocab_size >= MAX_VOCAB_SIZE:  # the kernels have arrays of this length, and ids of 32 bits
            return None
        if self._token_bytes is None and (
            self.kernels or (num_ids >= _MIN_DECODER_IDS and self.may_use_kernels(num_ids))
        ):
            loading.load_kernels("encoding")
            from basic.bpe.kernels.decode import TokenBytes

            self._token_bytes = TokenBytes(self.vocab)
        return self._token_bytes

    def decode(self, ids: Iterable[int] | npt.NDArray[np.integer], *, skip_special_tokens: bool = False) -> str:
        """Decode ids to text; bytes that are not UTF-8 become U+FFFD.

        Args:
            ids: a list, a one-dimensional array or tensor, or any iterable of integers.

        Raises:
            TypeError: `ids` are not integers.
            InvalidInputError: an id is not in the vocabulary, or an array has another shape or dtype.
        """
        return self.decode_bytes(ids, skip_special_tokens=skip_special_tokens).decode(errors="replace")

    def decode_batch(
        self, batch: Iterable[Iterable[int] | npt.NDArray[np.integer]], *, skip_special_tokens: bool = False
    ) -> list[str]:
        """Decode each of several sequences of ids, or the rows of an array or tensor, as `decode` does."""
        return [self.decode(ids, skip_special_tokens=skip_special_tokens) for ids in batch]

    def stream_decoder(self, *, skip_special_tokens: bool = False) -> StreamDecoder:
        """Return a decoder for ids that arrive one after the other: its texts have no unfinished characters."""
        return StreamDecoder(partial(self.decode_bytes, skip_special_tokens=skip_special_tokens))

    def decode_bytes(self, ids: Iterable[int] | npt.NDArray[np.integer], *, skip_special_tokens: bool = False) -> bytes:
        """Decode ids to bytes, which may start or end inside a character.

        Raises:
            TypeError, InvalidInputError: as for `decode`.
        """
        skipped = self.skipped_ids if skip_special_tokens else frozenset()
        decoded = None
        if isinstance(ids, np.ndarray) and ids.ndim == 1 and ids.dtype.kind in "iu":
            kept = ids[~np.isin(ids, list(skipped))] if skipped else ids
            decoded = decoder.decode(kept) if (decoder := self._kernel_decoder(len(ids))) is not None else None
        elif isinstance(ids, list) and not skipped:
            decoded = decoder.decode_list(ids) if (decoder := self._kernel_decoder(len(ids))) is not None else None
        # The kernels return None for what is not a known id; the plain path then raises the error.
        if decoded is not None:
            return decoded
        ids = id_list("ids", ids)
        try:
            if skipped:
                return b"".join([self.vocab[token_id] for token_id in ids if token_id not in skipped])
            return b"".join([self.vocab[token_id] for token_id in ids])
        except KeyError:
            position, unknown = next((i, token_id) for i, token_id in enumerate(ids) if token_id not in self.vocab)
            raise InvalidInputError(
                f"id {unknown!r} at position {position} is not in the vocabulary, whose largest id is "
                f"{self.vocab_size - 1}; are these the ids of another tokenizer?"
            ) from None
