"""Stages that stand on each other."""
