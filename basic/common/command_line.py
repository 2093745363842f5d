"""How a script ends: an error is one line, Ctrl-C is no error, and a traceback comes to those who ask for it."""

from __future__ import annotations

import sys
from collections.abc import Callable

TRACEBACK_OPTION = "--traceback"


def run(script: Callable[[], object]) -> None:
    """Call a script's main part; what the user can mend ends it with one line and status 1, Ctrl-C with status 130.

    With `--traceback` among the arguments, which is taken out of them, errors show where they come from.
    """
    with_traceback = TRACEBACK_OPTION in sys.argv
    if with_traceback:
        sys.argv.remove(TRACEBACK_OPTION)
    try:
        script()
    except KeyboardInterrupt as stop:
        if with_traceback:
            raise
        print("\n" * sys.stderr.isatty() + (str(stop) or "interrupted"), file=sys.stderr)  # not behind the ^C
        sys.exit(130)
    except (OSError, ValueError, FloatingPointError, MemoryError) as error:
        if with_traceback:
            raise
        sys.exit("error: " + " ".join(str(error).splitlines()))
