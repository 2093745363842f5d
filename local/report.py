"""`basic report` for a clone: `uv run local/report.py --help`."""

from basic.__main__ import main

if __name__ == "__main__":
    main("report")
