"""Turns the distilled student into artifacts that people deploy, and runs them. Importing it loads no torch."""
