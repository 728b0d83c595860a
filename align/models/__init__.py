"""Loading models, the trunk and its roles, and sampling from it."""
