"""Answers of a model: used while it is trained, and afterwards."""
