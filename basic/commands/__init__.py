"""The commands: `basic NAME`, `python -m basic NAME` and, in a clone, `uv run local/NAME.py` call these modules."""
