"""`basic evaluate` for a clone: `uv run local/evaluate.py --help`."""

from basic.__main__ import main

if __name__ == "__main__":
    main("evaluate")
