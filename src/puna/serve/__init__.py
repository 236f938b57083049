"""Floor 5: programs as people meet them: the quickstart, the model card, the terminal chat."""
