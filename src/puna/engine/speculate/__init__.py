"""Tokens proposed ahead, and how many of them pay; the answers stay what they are."""
