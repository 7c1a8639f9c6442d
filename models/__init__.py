"""Torch modules, and what is needed to save and load them."""
