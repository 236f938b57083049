"""Rows of logits to tokens: every knob, each row by its own random numbers."""
