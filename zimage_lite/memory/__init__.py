"""The budget: what the machine has, who stays in memory, and what was really used. Knows tensors, not Z-Image."""
