"""Which documents are worth training on: filters, duplicates, overlap with evaluation text."""
