"""What computes the logits of each next token: the model itself, or the decoders with kernels, which do the same."""

from __future__ import annotations

from jaxtyping import Float, Int
from torch import Tensor

from basic.model import KVCache, TransformerLM


class Decoder:
    """Reads the ids of all sequences, which are at one position, and keeps what later ones need of them.

    This one calls the model. `basic.generation.cpu_decoder` and `basic.generation.gpu_decoder` have kernels.

    Args:
        cache: of keys and values; None computes those of all ids again at each call.

    Attributes:
        chooses: whether it can continue sequences by their likeliest ids itself (`choose`).
    """

    chooses = False

    def __init__(self, model: TransformerLM, cache: KVCache | None):
        self.model, self.cache = model, cache

    @property
    def num_read(self) -> int:
        """The number of ids whose keys and values are in the cache."""
        return 0 if self.cache is None else self.cache.length

    def read(self, ids: Int[Tensor, " batch length"]) -> Float[Tensor, " batch vocab_size"]:
        """Read the ids behind the first `num_read`; return the logits of the token after them.

        They are valid until the next call.
        """
        if self.cache is None:
            return self.model(ids)[:, -1]
        new = ids[:, self.num_read :]
        logits = self.model(new, self.cache)[:, -1]
        self.cache.advance(new.shape[1])
        return logits

    def forget(self, num_known: int) -> None:
        """Begin again with sequences of which `num_known` ids are known; the next of each is to be chosen."""
        if self.cache is not None:
            self.cache.length = 0

    def choose(self, ids: Int[Tensor, " batch total"], length: int, most: int) -> int:
        """Write the likeliest ids, or those of a prompt, to up to `most` columns from `length` on.

        All ids before them but the last have been read.

        Returns:
            The new length.
        """
        raise NotImplementedError

    def close(self, model: TransformerLM) -> None:
        """End; what takes long to make may be kept for the next decoder of the model."""
