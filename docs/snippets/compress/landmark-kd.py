"""A large network finds landmark points well, but is too slow: how does a small one learn from it, and from an easier task beside?"""

from torch import nn

from neurarium import data
from neurarium.compress import ActiveShapeModel, LandmarkKD
from neurarium.learn.fit import Backprop

faces = data.synthetic_faces(100, 20, size=16)
smooth = ActiveShapeModel(variance=0.95).fit(faces.train.y).smooth(faces.train.y)  # easier targets


def network(width: int) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(256, width), nn.ReLU(), nn.Linear(width, 64))


tough, tolerant, student = network(128), network(128), network(16)
Backprop(loss="mse").fit(tough, faces.train.batches(20), epochs=2)
Backprop(loss="mse").fit(tolerant, data.TensorData(faces.train.x, smooth).batches(20), epochs=2)
LandmarkKD(tough, tolerant).fit(student, faces.train.batches(20), epochs=2)
print(f"error: {faces.nme(student(faces.test.x), faces.test.y).mean():.2f} of the distance between the eyes")
