"""Version of dfadc, in a module of its own so that no other import is needed to read it."""

__version__ = "0.1.0"
