"""What a comparison of two models consists of: its sides, their answers, who judges them, and what it reports."""
