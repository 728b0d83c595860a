"""Answers to held-out prompts, drawn and measured while a run trains."""
