"""What a tokenizer is, apart from how it encodes: its parts, its identity, and how it is extended, saved and opened."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import replace
from functools import cached_property
from typing import Any, Self

from basic.bpe.compiled import KernelEncoder
from basic.bpe.plain import PretokenCache, is_pair_of_bytes, merge_rules, rules_of_ranks
from basic.bytes_utils import load_merges, load_vocab
from basic.common.arguments import check_errors_option, check_integer
from basic.common.errors import InvalidInputError
from basic.pretokenization import GPT2_PATTERN, Pattern, SpecialTokens, resolve_pattern
from basic.tokenizer_files.content import ChatTemplate, TokenizerContent, TokenizerSettings
from basic.tokenizer_files.equivalent_merges import UsedMerges, missing_bytes, used_merges
from basic.tokenizer_files.normalization import UNICODE_VERSION, TextChanges
from basic.tokenizer_files.opening import read_tokenizer
from basic.tokenizer_files.our_folder import damaged_folder, write_folder
from basic.tokenizer_files.vocabulary import Vocabulary

_NO_SPECIALS = SpecialTokens(())


class TokenizerDefinition(Vocabulary):
    """The half of `basic.Tokenizer.Tokenizer` that does not encode; its arguments are documented there."""

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

    def with_special_tokens(self, special_tokens: Iterable[str]) -> Self:
        """Return a tokenizer with further special tokens, after its own; those that it has already stay as they are.

        One whose bytes are not in the vocabulary gets the next id after the largest.
        """
        new = SpecialTokens(special_tokens).tokens
        return self._extended([], [token for token in new if token not in self.special_token_ids])

    def with_merges(self, merges: Iterable[tuple[bytes, bytes]]) -> Self:
        """Return a tokenizer with further merges, after its own, such as those of `basic.train_bpe.learn_more_merges`.

        A token that is not in the vocabulary gets the next id after the largest. All other ids stay.

        Raises:
            TypeError: a merge is not a pair of bytes.
            InvalidInputError: a merge needs a token that is not in the vocabulary.
        """
        return self._extended(list(merges), [])

    def _extended(self, merges: list[tuple[bytes, bytes]], special_tokens: list[str]) -> Self:
        tokens = set(self.vocab.values())
        made = [left + right for left, right in filter(is_pair_of_bytes, merges)]  # the others are refused below
        new = [token for token in dict.fromkeys(made) if token not in tokens]
        return type(self)(
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

    def kernel_encoder(self, num_bytes: int, num_mapped_bytes: int = 0) -> KernelEncoder | None:
        """The encoder that uses the kernels, or None for the plain path; see `basic.Tokenizer`."""
        return None

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

    @classmethod
    def from_files(
        cls,
        vocab_filepath: str | os.PathLike,
        merges_filepath: str | os.PathLike,
        special_tokens: Iterable[str] | None = None,
        *,
        pattern: str | Pattern | None = None,
        kernels: bool | None = None,
    ) -> Self:
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
    def load(cls, path: str | os.PathLike, *, pattern: str | Pattern | None = None) -> Self:
        """Read a tokenizer of any kind. The ids are exactly those of the program that it is from.

        - A folder that `save` wrote, or a run, which has such a folder.
        - A `tokenizer.json` with byte-level BPE, or a folder with it; also one with only `vocab.json` and `merges.txt`.
        - A rank file of tiktoken (`*.tiktoken`, Llama 3's `tokenizer.model`). As for tiktoken, there is no
          normalization; Qwen's tokenizers bring a text to NFC first, which their tokenizer.json says.

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
    def from_content(cls, content: TokenizerContent) -> Self:
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
