"""What model.py is made of."""
