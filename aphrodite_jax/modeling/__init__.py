"""Models, their layers, and loading their weights."""
