"""`basic encode` for a clone: `uv run local/encode.py --help`."""

from basic.__main__ import main

if __name__ == "__main__":
    main("encode")
