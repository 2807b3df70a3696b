"""Writes the catalogue's topics to the lake, exactly once; a process of its own.

`python -m services.features.lake.app`; docs/adr/0011-the-lake.md says why it is made as it is.
"""
