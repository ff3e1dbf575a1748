"""Recipes that come with dfadc, as TOML files."""
