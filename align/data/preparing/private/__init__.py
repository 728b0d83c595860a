"""Private values in a text: where they stand, of what kind they are, and what is the same value."""
