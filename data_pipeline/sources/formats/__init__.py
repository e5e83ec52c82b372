"""One module for each format of files, which registers itself: a new format is one new file here, and no other edit.

:mod:`data_pipeline.sources.format` says what a format consists of and finds the modules by listing this package.
"""
