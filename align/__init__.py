"""Align language models on the hardware you have: SFT, reward models, PPO, DPO and classifier heads."""

import os

# No telemetry: set before any library that would send it is imported.
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("DO_NOT_TRACK", "1")
# Tokenizers run before any fork here; the warning about it helps nobody.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")

__version__ = "0.1.0"
