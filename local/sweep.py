"""`basic sweep` for a clone: `uv run local/sweep.py --help`."""

from basic.__main__ import main

if __name__ == "__main__":
    main("sweep")
