"""The data card: what rows are there, counted, and which of them to look at."""
