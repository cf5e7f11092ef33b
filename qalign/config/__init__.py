"""What the user asked for: a recipe's keys, reading and checking one, and the files that it names. Imports no torch."""
