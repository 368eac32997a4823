"""Trust: what a network has learned, how sure it may be, and what it does when somebody interferes."""
