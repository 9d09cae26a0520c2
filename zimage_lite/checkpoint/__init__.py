"""Files to named tensors and back. Headers are read whole and checked; weights are read only when asked for."""
