"""The errors that a user can correct.

A script prints such an error as one line. Any other ValueError is a bug of this library and shows its traceback. Each
type is also a built-in error, so `except ValueError` and `except OSError` still catch it.
"""


class BasicError(Exception):
    """Base class. The message says what was wrong, what was got, what is allowed, and what to do."""


class InvalidInputError(BasicError, ValueError):
    """An argument, an option or a text that cannot be used."""


class InvalidConfigError(InvalidInputError):
    """A setting that is unknown, of the wrong type or out of its range, or settings that contradict each other."""


class DamagedFileError(BasicError, ValueError):
    """A file that is incomplete, was changed after it was written, or does not have the expected format."""


class WrongTokenizerError(BasicError, ValueError):
    """Token ids and a tokenizer, or a tokenizer and a model, that do not belong together."""


class NotARunError(BasicError, FileNotFoundError):
    """A folder without a run, or without a checkpoint."""
