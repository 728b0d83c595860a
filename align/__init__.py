"""Align language models on the hardware you have: SFT, reward models, PPO, DPO and classifier heads."""
