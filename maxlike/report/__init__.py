"""The report of a run: one self-contained page and its curves as PNG files."""
