"""Mixers over frames [B, L, h, w, U], and frames as bytes."""
