"""Examples of the room `dynamic`, by theme."""
