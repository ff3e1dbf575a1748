"""Exporters of the distilled student to deployable artifacts, and sessions that run them. Imports no torch."""
