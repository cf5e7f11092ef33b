"""Figures, warnings and pictures from plain numbers. Imports no torch."""
