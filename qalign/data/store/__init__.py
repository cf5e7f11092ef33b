"""How rows and token ids are held: in memory where they are few, in files where they are many."""
