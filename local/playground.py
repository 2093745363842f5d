"""`basic playground` for a clone: `uv run local/playground.py --help`."""

from basic.__main__ import main

if __name__ == "__main__":
    main("playground")
