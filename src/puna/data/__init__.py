"""Floor 3: from token shards to batches whose order is a pure function of (seed, sample index)."""
