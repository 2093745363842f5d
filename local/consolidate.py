"""`basic consolidate` for a clone: `uv run local/consolidate.py --help`."""

from basic.__main__ import main

if __name__ == "__main__":
    main("consolidate")
