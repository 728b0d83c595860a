"""Plans of a recipe, before anything is loaded."""
