"""Experiments of the room trust."""
