"""The page's part about training: the curves of runs, and a tab that trains."""
