"""From files to token trees: rows of any format, rendered, mixed, split, packed into batches."""
