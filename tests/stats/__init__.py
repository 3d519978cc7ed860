"""How many rows each expert gets."""
