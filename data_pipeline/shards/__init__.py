"""What lies on disk: raw token files, their Arrow companions, and the checksummed manifest that lists them."""
