"""The recipe: its keys, loading and checking it, the files that it names, its documentation. Imports no torch."""
