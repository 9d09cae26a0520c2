"""What is here, what is wrong with it, and which kernels can be trusted."""
