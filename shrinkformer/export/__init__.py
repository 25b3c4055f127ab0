"""Models in the formats of other runtimes, each checked there before it appears."""
