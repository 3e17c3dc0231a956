"""A page to play with a checkpoint in a browser."""
