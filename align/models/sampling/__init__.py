"""The sampling engine: many responses at once, exact and repeatable."""
