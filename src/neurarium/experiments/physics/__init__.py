"""Experiments of the room physics."""
