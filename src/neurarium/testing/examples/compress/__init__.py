"""Examples of the room `compress`, by theme."""
