"""Training, sampling and scoring of generators: the papers' recipes.

The commands are ``python -m pixnorm.train``, ``pixnorm.sample`` and ``pixnorm.score``.
"""

from pixnorm.training.data import ImageDataset, load_dataset
from pixnorm.training.features import feature_network
from pixnorm.training.losses import LOSSES
from pixnorm.training.metrics import frechet_distance, mean_iou, prdc, real_statistics, score
from pixnorm.training.recipes import RECIPES, Recipe
from pixnorm.training.sampling import Sampler, load_sampler
from pixnorm.training.settings import Settings
from pixnorm.training.systems import System, build_system
from pixnorm.training.trainer import Trainer

__all__ = [
    "LOSSES",
    "RECIPES",
    "ImageDataset",
    "Recipe",
    "Sampler",
    "Settings",
    "System",
    "Trainer",
    "build_system",
    "feature_network",
    "frechet_distance",
    "load_dataset",
    "load_sampler",
    "mean_iou",
    "prdc",
    "real_statistics",
    "score",
]
