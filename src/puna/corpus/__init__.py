"""Floor 3, above data: from text and foreign files to token shards."""
