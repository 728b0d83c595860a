"""The sections of preparation, which `align.prepare` and the stages' recipes share."""
