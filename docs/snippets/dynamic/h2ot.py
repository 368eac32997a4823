"""My video transformer is too slow. How far do I get by keeping fewer and fewer frames, without any clever choice of them?"""

from neurarium import data
from neurarium.dynamic import VideoPoseTransformer, hourglass, mpjpe
from neurarium.meter import flops

task = data.pose_sequences(8, 2)
model = VideoPoseTransformer(task.frames, task.joints, dim=32, joint_tokens=False)  # your trained one
thin = hourglass(model, keep=[36, 24, 12], at=[1, 2, 3], prune="uniform", recover="interpolate")  # no new matrices: works at once
print(flops(thin, task.test.x) / flops(model, task.test.x), mpjpe(thin(task.test.x), task.test.y))
