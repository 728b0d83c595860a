"""Pure tensor functions: log-probabilities, losses, advantages. They import torch alone."""
