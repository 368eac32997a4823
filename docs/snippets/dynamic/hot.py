"""My transformer reads 54 video frames that resemble each other. Can its deep blocks read 18, and still answer for all 54?"""

from neurarium import data
from neurarium.dynamic import VideoPoseTransformer, hourglass, kept_frames
from neurarium.meter import flops

task = data.pose_sequences(8, 2)
model = VideoPoseTransformer(task.frames, task.joints, dim=32, joint_tokens=False)  # or your own with frames, blocks and head
thin = hourglass(model, keep=18, at=1)  # clusters choose after block 1, an attention recovers; train it on as you would train the model
print(thin(task.test.x).shape, flops(thin, task.test.x) / flops(model, task.test.x))
print(kept_frames(thin, task.test.x)[0])
