"""Hardware effects, and the counter-based generator that all randomness of a run comes from."""
