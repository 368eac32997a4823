"""A spiking network's error travels through layers and through time. What if the way through time, which needs the memory, is cut?"""

from neurarium import data, meter
from neurarium.spiking import SLTT
from neurarium.spiking.nn import vgg_small

task = data.images("digits", train=200)
model = vgg_small(1, 10, (8, 16), steps=6)  # or a network of your own with LIF neurons
with meter.SavedBytes() as saved:
    SLTT().fit(model, task.train.batches(50), epochs=1)
print(saved.peak)  # bytes kept for the backward pass: those of one step, however many steps there are
