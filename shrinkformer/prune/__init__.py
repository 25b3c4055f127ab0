"""Statistics, column selection, budget, refit and surgery."""
