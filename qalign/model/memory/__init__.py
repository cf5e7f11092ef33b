"""How much memory a stage takes: a forecast for its recipe, and one training step counted without weights."""
