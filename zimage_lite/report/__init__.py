"""Results of bench, compare and others as one page."""
