"""Responses to prompts, what they are worth, and what is learnt from them."""
