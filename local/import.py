"""`basic import` for a clone: `uv run local/import.py --help`."""

from basic.__main__ import main

if __name__ == "__main__":
    main("import")
