"""``python -m shrinkformer``."""

from shrinkformer.commands.main import main

if __name__ == "__main__":
    raise SystemExit(main())
