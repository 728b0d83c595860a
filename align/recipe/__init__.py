"""Recipes: a YAML file read into a typed object, or every problem in it at once with its line."""
