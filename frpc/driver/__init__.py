"""Runs the stages, keeps what was compiled, checks it, and runs it."""
