"""A language model from scratch: text to tokens, tokens to model, model to text."""

__version__ = "0.1.0"
