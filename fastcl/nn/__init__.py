"""Networks and layers: whatever holds parameters."""

from .convert import capacity, plot_capacity, reserved_masks, to_masked, to_plain
from .grow import grow, reindex, shrink
from .growth import plot_growth, plot_images
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
from .schedules import dgm_scale, hat_scale
from .simplenet import SimpleNet
from .vae import VAE, GaussianVAE

__all__ = [
    "VAE",
    "ConvergenceWarning",
    "GaussianMixture",
    "GaussianVAE",
    "MaskedConv1d",
    "MaskedConv2d",
    "MaskedConv3d",
    "MaskedConvTranspose2d",
    "MaskedLayer",
    "MaskedLinear",
    "Plan",
    "SimpleNet",
    "begin_task",
    "capacity",
    "dgm_scale",
    "end_task",
    "grow",
    "hat_scale",
    "learn_features",
    "masked_layers",
    "mlp",
    "plot_capacity",
    "plot_growth",
    "plot_images",
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
