"""Floor 2: text to token ids and back; chat messages to token ids and a loss mask."""
