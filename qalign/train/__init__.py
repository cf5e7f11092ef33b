"""What every stage shares: its run folder, its rows as ids, its loop."""
