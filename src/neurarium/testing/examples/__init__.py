"""Tiny examples of the library's own methods, one file a room: what the conformance suite is applied to."""
