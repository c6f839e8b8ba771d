"""Which nodes a layer is computed from."""

from __future__ import annotations

from torch import fx

from frpc.assign.assignment import Assignment

__all__ = ["feeding"]


def feeding(assignment: Assignment, layer: fx.Node) -> set[fx.Node]:
    """Returns the carrying nodes a layer is computed from, itself included."""
    found: set[fx.Node] = {layer}
    stack = [layer]
    while stack:
        node = stack.pop()
        feeds = assignment.rules[node].operands.values() if node in assignment.rules else node.all_input_nodes
        for feed in feeds:
            if feed in assignment.carried and feed not in found:
                found.add(feed)
                stack.append(feed)
    return found
