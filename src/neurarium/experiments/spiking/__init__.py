"""Experiments of the room `spiking`."""
