"""Trainers: nnU-Net's training loop around a denoiser."""
