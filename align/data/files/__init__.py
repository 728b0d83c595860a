"""Files of rows: which there are, and their records."""
