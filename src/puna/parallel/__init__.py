"""Floor 3: many processes, one model. Passes applied after building it, and exchanges behind its seams."""
