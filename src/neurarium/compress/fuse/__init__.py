"""Fusing trained networks: neurons by optimal transport, layers by alignment."""
