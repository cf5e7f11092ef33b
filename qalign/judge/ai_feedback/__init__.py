"""AI feedback by a constitution: critiques, revisions and labels, and whether the labeller can judge."""
