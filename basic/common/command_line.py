"""How a script ends: an error of the user is one line, and Ctrl-C is not an error."""

from __future__ import annotations

import sys
from collections.abc import Callable

from basic.common.errors import BasicError

TRACEBACK_OPTION = "--traceback"


def run(script: Callable[[], object]) -> None:
    """Call a script's main function, and exit if it fails.

    An error that the user can correct is printed as one line (status 1), and Ctrl-C ends the script with status 130.
    If `--traceback` is among the arguments, it is removed from them, and errors show their traceback.
    """
    with_traceback = TRACEBACK_OPTION in sys.argv
    if with_traceback:
        sys.argv.remove(TRACEBACK_OPTION)
    try:
        script()
    except KeyboardInterrupt as interrupt:
        if with_traceback:
            raise
        # The terminal shows ^C, so the message starts on a new line.
        print("\n" * sys.stderr.isatty() + (str(interrupt) or "interrupted"), file=sys.stderr)
        sys.exit(130)
    except (BasicError, OSError, FloatingPointError, MemoryError) as error:
        if with_traceback:
            raise
        sys.exit("error: " + " ".join(str(error).splitlines()))
