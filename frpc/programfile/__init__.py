"""Explainers in files: plain data over a closed list of operators, read without running any of it."""

from frpc.programfile.loaded import LoadedExplainer
from frpc.programfile.reading import load
from frpc.programfile.saving import save

__all__ = ["LoadedExplainer", "load", "save"]
