"""A language model from scratch: text to tokens, tokens to model, model to text."""
