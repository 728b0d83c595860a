"""Row steps that drop rows for what stands in them."""
