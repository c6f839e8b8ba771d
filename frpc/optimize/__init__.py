"""The same function with fewer and faster calls."""
