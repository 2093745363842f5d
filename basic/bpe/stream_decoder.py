"""Decode ids that arrive one after the other."""

from __future__ import annotations

import codecs
from collections.abc import Callable, Iterable


class StreamDecoder:
    """Decodes a stream of ids to text; a character whose bytes are in several tokens comes with the last of them.

    Bytes that are not UTF-8 become U+FFFD, as soon as it is certain that no character can begin with them. So the
    texts, joined, are those of all ids decoded at once.

    Examples:
        >>> decoder = tokenizer.stream_decoder()  # where "é" is two tokens
        >>> [decoder.decode(token_id) for token_id in tokenizer.encode("né!")]
        ['n', '', 'é', '!']
    """

    def __init__(self, decode_bytes: Callable[[list[int]], bytes]) -> None:
        self._decode_bytes = decode_bytes
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def decode(self, ids: int | Iterable[int]) -> str:
        """Return the text that is complete with the next id or ids, which may be empty.

        Raises:
            TypeError, InvalidInputError: as for `Tokenizer.decode`.
        """
        ids = [*ids] if isinstance(ids, Iterable) else [ids]
        return self._utf8.decode(self._decode_bytes(ids))

    def finish(self) -> str:
        """End the stream: return U+FFFD for an unfinished character, or nothing; another stream may follow."""
        rest = self._utf8.decode(b"", final=True)
        self._utf8.reset()
        return rest
