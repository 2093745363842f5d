"""`basic export` for a clone: `uv run local/export.py --help`."""

from basic.__main__ import main

if __name__ == "__main__":
    main("export")
