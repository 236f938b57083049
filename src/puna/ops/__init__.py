"""Floor 1: pure functions on tensors. A plain-torch twin stands beside every kernel."""
