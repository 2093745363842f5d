"""A web page to explore tokenizers and models in a browser."""
