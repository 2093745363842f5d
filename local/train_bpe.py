"""`basic train-bpe` for a clone: `uv run local/train_bpe.py --help`."""

from basic.__main__ import main

if __name__ == "__main__":
    main("train-bpe")
