"""One file an op: the Python side of the operator's schema, its autograd, its public functions."""
