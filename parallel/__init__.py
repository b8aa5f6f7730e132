"""Everything that spreads a model over devices, applied to it from outside."""
