"""Tasks, their data, and what is bundled for the demo."""
