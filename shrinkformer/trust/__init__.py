"""What is checked before a file of somebody else is used: sizes, shapes, places and nesting, never its good will."""
