"""Floor 2: the one model definition, for one device, on flat tokens."""
