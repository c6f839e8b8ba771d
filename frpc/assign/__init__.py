"""A rule for every node that carries relevance, or one error that lists all gaps."""
