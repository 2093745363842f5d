"""`basic quickstart` for a clone: `uv run local/quickstart.py --help`."""

from basic.__main__ import main

if __name__ == "__main__":
    main("quickstart")
