"""Rules of layer-wise relevance propagation, and rules that change the backward pass itself."""
