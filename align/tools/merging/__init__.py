"""Results as ordinary checkpoints: merged, checked, described, exported."""
