"""Per-frame embeddings: the encoder, the store they are kept in, the bank they are trained from."""
