"""Rows of every format as canonical rows."""
