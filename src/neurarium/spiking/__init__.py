"""Room ``spiking``: spiking neural networks. Neurons without hidden state, executors over time, learning rules, coding."""
