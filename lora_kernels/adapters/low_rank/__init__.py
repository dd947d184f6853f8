"""Methods that put something between, beside or around A and B, one a file."""
