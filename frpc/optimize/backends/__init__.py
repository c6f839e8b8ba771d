"""How a program runs on its device."""
