"""Charts of runs and checkpoints, as HTML pages with inline SVG and as PNG."""
