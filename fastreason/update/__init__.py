"""Updating weights: the protocol that the loop uses, and DeepSpeed behind it."""
