"""Can one training give many networks of different size, each of them hard to fool?"""

from neurarium import data
from neurarium.dynamic import Config, ElasticBackbone, ElasticFamily, ProARD

task = data.images("digits", train=200)
model = ElasticBackbone(widths=(4, 8), strides=(2, 1), blocks=(0, 1))  # or an elastic model of your own
configs = [Config((4, w, e), (d,)) for w in (4, 8) for e in (4, 8) for d in (0, 1)]
family = ElasticFamily(model, configs, task.train.x[:2])

learner = ProARD(eps=0.1, step=0.05, attack_steps=2, teacher_epochs=2, stage_epochs=1)
history = learner.fit(family, task.train.batches(50), epochs=5)  # two of the teacher, then width, depth, expand
small = family.extract(family.configs[0]).eval()  # a plain module with weights of its own
print(history.extra["flops"][-1], small(task.test.x[:4]).argmax(1))
