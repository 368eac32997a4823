"""Experiments of the room `compress`."""
