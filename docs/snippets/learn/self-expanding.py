"""How large should my convolutional network be, if it may decide that itself while it trains?"""

from torch import nn

from neurarium import data
from neurarium.learn import SelfExpanding, evaluate

task = data.images("digits", train=800)
model = nn.Sequential(
    nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(4, 8, 3, padding=1), nn.ReLU(),
    nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, 10),
)  # fmt: skip
history = SelfExpanding(cooldown=2, samples=128).fit(model, task.train.batches(64), epochs=7)
print("parameters in each epoch:", history.extra["parameters"])
print("grew before the epochs", history.extra["expansions"])
print(evaluate(model, task.test.batches(256, shuffle=False)))  # model itself has grown
