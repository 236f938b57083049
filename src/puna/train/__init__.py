"""Floor 4: the training step, its optimizer, its metrics and its loop."""
