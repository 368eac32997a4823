"""Real data sets and faithful generators, in memory, seeded.

    task = data.images("mnist", train=5000)
    for x, y in task.train.batches(128, seed=0): ...

Sets that scikit-learn and scikit-image embed need nothing. The others are read from the mirror folder ``$NEURARIUM_DATA`` or from
the cache, or are downloaded once from their canonical address; offline, :class:`~neurarium.errors.MissingData` names both.
:data:`SETS` lists them all; every loader returns a frozen task whose ``note`` says what differs from the published set."""

from neurarium.data.characters import baybayin
from neurarium.data.faces import FaceTask, synthetic_faces
from neurarium.data.fields import FieldTask, advected_field
from neurarium.data.graphs import GraphTask, graph
from neurarium.data.omics import ViewData, digit_views, multi_omics
from neurarium.data.poses import PoseTask, pose_sequences
from neurarium.data.registry import SETS, available, get, where
from neurarium.data.sequences import SeriesTask, arma, series
from neurarium.data.sounds import AudioTask, audio
from neurarium.data.store import Source, cache_dir, mirror_dir
from neurarium.data.tables import TabularTask, tabular
from neurarium.data.tensors import Batches, TensorData, stratified
from neurarium.data.texts import Texts, TextTask, text
from neurarium.data.vision import ImageTask, images, photos

__all__ = [
    "SETS",
    "AudioTask",
    "Batches",
    "FaceTask",
    "FieldTask",
    "GraphTask",
    "ImageTask",
    "PoseTask",
    "SeriesTask",
    "Source",
    "TabularTask",
    "TensorData",
    "TextTask",
    "Texts",
    "ViewData",
    "advected_field",
    "arma",
    "audio",
    "available",
    "baybayin",
    "cache_dir",
    "digit_views",
    "get",
    "graph",
    "images",
    "mirror_dir",
    "multi_omics",
    "photos",
    "pose_sequences",
    "series",
    "stratified",
    "synthetic_faces",
    "tabular",
    "text",
    "where",
]
