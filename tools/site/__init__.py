"""The documentation as a site: README.md and docs/ by MkDocs, with what GitHub does and MkDocs does not."""
