"""Tiny examples of the room ``nn``, one module a kind of layer."""
