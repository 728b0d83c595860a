"""What lies on the disk: bases, results, adapters."""
