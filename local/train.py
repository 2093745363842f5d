"""`basic train` for a clone: `uv run local/train.py --help`."""

from basic.__main__ import main

if __name__ == "__main__":
    main("train")
