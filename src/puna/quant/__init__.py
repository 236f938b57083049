"""From weights to few bits: methods as pure functions, one walk over the layers, one report card."""
