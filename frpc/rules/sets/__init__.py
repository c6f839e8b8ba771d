"""Rule sets: which rule each operator gets."""
