"""What a run does on held-out rows, on tasks, and on questions of our own: helpful, harmless, honest."""
