"""Generates answers, during training and afterwards."""
