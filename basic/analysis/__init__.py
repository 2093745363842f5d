"""What a model knows, and how it is shown."""
