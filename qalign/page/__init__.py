"""The page that compares models side by side."""
