"""Floor 3: tensors on disk. One name table per family, used in both directions."""
