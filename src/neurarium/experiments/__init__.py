"""One short file a paper: data, arms, what is logged. Nothing here is imported by a room."""
