"""The model in plain torch: skeletons without weights, to which weights are bound. Knows no files and no budgets."""
