"""An OpenAI-compatible server for results on one trunk."""
