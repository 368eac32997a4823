"""Tiny examples of the room ``learn``, one module a family of methods."""
