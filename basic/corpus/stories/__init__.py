"""The embedded corpus: a grammar of little stories."""
