"""Rows of any format, cleaned: filtered, made private, deduplicated, mixed and split, in steps."""
