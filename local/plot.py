"""`basic plot` for a clone: `uv run local/plot.py --help`."""

from basic.__main__ import main

if __name__ == "__main__":
    main("plot")
