"""The kernels, one package per hot path. Every function here is also an op, ``torch.ops.fastcl.<name>``."""

from .annealed_mask import annealed_mask, compensated_mask, mask_sparsity, masked_weight, masked_weight_kept
from .gmm import gmm_class_statistics, gmm_log_prob, gmm_responsibilities, gmm_sample, gmm_statistics
from .importance import (
    accumulate_affine_,
    accumulate_conv_,
    accumulate_outer_,
    accumulate_path_,
    accumulate_walk_,
    consolidate_path_,
    merge_anchored_,
    merge_importances_,
    quadratic_penalty,
    quadratic_penalty_grad_,
    score_walk_,
)
from .masked_grad import masked_adam_, masked_grad_, masked_grad_any_, masked_sgd_, pack_mask, unpack_mask
from .proximal import drift_norms, group_soft_threshold_, soft_threshold_

__all__ = [
    "accumulate_affine_",
    "accumulate_conv_",
    "accumulate_outer_",
    "accumulate_path_",
    "accumulate_walk_",
    "annealed_mask",
    "compensated_mask",
    "consolidate_path_",
    "drift_norms",
    "gmm_class_statistics",
    "gmm_log_prob",
    "gmm_responsibilities",
    "gmm_sample",
    "gmm_statistics",
    "group_soft_threshold_",
    "mask_sparsity",
    "masked_adam_",
    "masked_grad_",
    "masked_grad_any_",
    "masked_sgd_",
    "masked_weight",
    "masked_weight_kept",
    "merge_anchored_",
    "merge_importances_",
    "pack_mask",
    "quadratic_penalty",
    "quadratic_penalty_grad_",
    "score_walk_",
    "soft_threshold_",
    "unpack_mask",
]
