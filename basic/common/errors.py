"""The errors that a user can mend.

A script shows them as one line; any other ValueError is a bug of ours and shows its traceback. Each is also the
built-in error that it is a kind of, so that `except ValueError` and `except OSError` still catch it.
"""


class BasicError(Exception):
    """Something that the user can mend; the message says what was wrong, what was got, what is allowed, what to do."""


class InvalidInputError(BasicError, ValueError):
    """An argument, an option or a text that cannot be used."""


class InvalidConfigError(InvalidInputError):
    """A setting that is unknown, of the wrong type or out of its range, or settings that do not fit together."""


class DamagedFileError(BasicError, ValueError):
    """A file that is cut off, changed since it was written, or not of the expected format."""


class WrongTokenizerError(BasicError, ValueError):
    """Token ids and a tokenizer, or a tokenizer and a model, that do not belong together."""


class NotARunError(BasicError, FileNotFoundError):
    """A folder that holds no run, or no checkpoint yet."""
