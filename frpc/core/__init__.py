"""What every stage stands on: graphs and what their nodes carry, PyTorch's private parts, stages and their failures."""
