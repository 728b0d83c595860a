"""A policy's responses and what is measured of them."""
