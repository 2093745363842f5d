"""`basic generate` for a clone: `uv run local/generate.py --help`."""

from basic.__main__ import main

if __name__ == "__main__":
    main("generate")
