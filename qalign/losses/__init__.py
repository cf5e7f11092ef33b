"""Losses and the maths around them: pure functions of tensors, each with its paper and equation."""
