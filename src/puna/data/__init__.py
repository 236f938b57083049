"""Floor 3: from text to batches whose order is a pure function of (seed, sample index)."""
