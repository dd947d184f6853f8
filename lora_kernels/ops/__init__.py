"""Public functions and their autograd, one file an op."""
