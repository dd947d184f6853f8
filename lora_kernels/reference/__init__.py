"""Eager PyTorch twins of every op: the oracle of the tests and the backend that runs anywhere."""
