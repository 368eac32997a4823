"""Can stochastic gradients fit a long auto-regression as well as least squares, with a cost that grows only linearly in its order?"""

from neurarium import data
from neurarium.sequence import ARNet

series = data.arma([0.2, 0.3, -0.5], [], 2000, noise=1.0, seed=0)
model = ARNet(order=20, sparsity=0.15)  # about 15 % of the coefficients are expected to matter
model.fit(series, epochs=3)
print(model.coefficients)
