"""The one training loop and its two recipes: the encoder on frames, the temporal model on windows."""
