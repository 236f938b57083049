"""Floor 4: requests in, tokens out, on the very Transformer that was trained."""
