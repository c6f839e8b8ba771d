"""Explainers in files: plain data over a closed list of operators, read without running any of it."""

from frpc.files.loaded import LoadedExplainer
from frpc.files.reading import load
from frpc.files.saving import save

__all__ = ["LoadedExplainer", "load", "save"]
