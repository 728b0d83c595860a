"""Where a command meets what it cannot trust: errors, signals, processes, the user's own code."""
