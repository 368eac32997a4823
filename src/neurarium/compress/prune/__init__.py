"""Planners that remove single weights or channels."""
