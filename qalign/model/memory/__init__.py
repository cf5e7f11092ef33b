"""How much memory a stage takes: a forecast for its recipe, one training step counted without weights, and what happens
where a row or a step doesn't fit."""
