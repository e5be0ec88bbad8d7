"""Windows of frames: where they start, how they are augmented, how they become batches."""
