"""Facial expressions in video: embeddings once, temporal Transformers in minutes, noise-aware weighting."""
