"""The Python API: the stages of `dfadc distill`, each usable alone.

The command line calls these functions and no others.
"""
