"""Tokenizers in files: our folder, tokenizer.json, rank files; what they say beside vocabulary and merges."""
