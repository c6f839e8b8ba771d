"""The maps of every neuron of one layer."""
