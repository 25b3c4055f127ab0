"""One module per entry script: parse, call the library, report."""
