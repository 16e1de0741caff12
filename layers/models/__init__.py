"""Whole models: encoder, blocks of mixers, head; and `build`, which makes them."""
