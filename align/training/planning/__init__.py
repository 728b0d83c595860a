"""What a run will take, from its recipe alone: memory, work, traffic and time."""
