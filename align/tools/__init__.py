"""Parts of the tools around the stages: what `align.compare` and its neighbours are made of."""
