"""Floor 0: configuration, console, storage, hardware. Knows nothing of models."""
