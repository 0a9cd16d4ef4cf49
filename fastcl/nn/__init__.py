"""Networks and layers: whatever holds parameters."""

from .augment import jitter
from .bridge import Bridge, compose
from .convert import capacity, plot_capacity, reserved_masks, to_masked, to_plain
from .distill import distillation
from .dynamic import DynamicGenerator
from .exemplars import Exemplars, herd
from .gan import (
    DCGAN,
    WGAN,
    ConditionalBatchNorm2d,
    Discriminator,
    FeatureCritic,
    FeatureGenerator,
    class_loss,
    critic_loss,
    crop,
    fixed_statistics,
    frozen,
)
from .grow import grow, reindex, shrink
from .growth import plot_growth, plot_images, plot_size
from .masked import (
    MaskedConv1d,
    MaskedConv2d,
    MaskedConv3d,
    MaskedConvTranspose2d,
    MaskedLayer,
    MaskedLinear,
    begin_task,
    end_task,
    masked_layers,
    set_scale,
    sparsity,
    use_task,
)
from .mixture import ConvergenceWarning, GaussianMixture
from .mlp import mlp
from .nflae import learn_features
from .plan import Plan, trace
from .precision import mixed
from .projection import layer_inputs, project_onto_outputs, project_step
from .replay import Replay, make_generator
from .schedules import dgm_scale, hat_scale
from .simplenet import SimpleNet
from .vae import VAE, ConditionalVAE, GaussianVAE

__all__ = [
    "DCGAN",
    "VAE",
    "WGAN",
    "Bridge",
    "ConditionalBatchNorm2d",
    "ConditionalVAE",
    "ConvergenceWarning",
    "Discriminator",
    "DynamicGenerator",
    "Exemplars",
    "FeatureCritic",
    "FeatureGenerator",
    "GaussianMixture",
    "GaussianVAE",
    "MaskedConv1d",
    "MaskedConv2d",
    "MaskedConv3d",
    "MaskedConvTranspose2d",
    "MaskedLayer",
    "MaskedLinear",
    "Plan",
    "Replay",
    "SimpleNet",
    "begin_task",
    "capacity",
    "class_loss",
    "compose",
    "critic_loss",
    "crop",
    "dgm_scale",
    "distillation",
    "end_task",
    "fixed_statistics",
    "frozen",
    "grow",
    "hat_scale",
    "herd",
    "jitter",
    "layer_inputs",
    "learn_features",
    "make_generator",
    "masked_layers",
    "mixed",
    "mlp",
    "plot_capacity",
    "plot_growth",
    "plot_images",
    "plot_size",
    "project_onto_outputs",
    "project_step",
    "reindex",
    "reserved_masks",
    "set_scale",
    "shrink",
    "sparsity",
    "to_masked",
    "to_plain",
    "trace",
    "use_task",
]
