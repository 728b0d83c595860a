"""A classifier's measures, and labels for new texts."""
