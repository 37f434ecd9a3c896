"""The plain-PyTorch meaning of every op, and the three models on stock layers: the specification."""
