"""What truly has no better home."""
