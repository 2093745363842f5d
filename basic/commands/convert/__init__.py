"""Commands that turn a run into files of other programs, and back."""
