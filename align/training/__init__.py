"""What every stage trains with: the loop, checkpoints, meters and the report."""
