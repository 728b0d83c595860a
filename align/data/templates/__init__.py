"""Canonical rows as text and token trees, through a chat template."""
