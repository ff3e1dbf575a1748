"""Shipped recipes, one TOML file each; `dfadc recipe list` shows them."""
