"""Whole models as graphs: traced, matched with our operators, and run."""
