"""From window probabilities to one row per frame, and to the challenge submission."""
