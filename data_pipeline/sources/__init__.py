"""Text as it comes: files, hub datasets, standard input; cut into pieces of work and read record by record."""
