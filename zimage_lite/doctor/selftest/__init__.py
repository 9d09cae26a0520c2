"""The self-test of the kernels: which of them can be trusted on this machine."""
