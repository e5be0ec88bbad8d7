"""Objectives: noise-aware weights and the losses that use them."""
