"""Set steps that find rows, and parts of rows, which repeat earlier ones."""
