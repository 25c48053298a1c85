"""Distillation losses: pure functions `(student, teacher, ..., *, reduction)` on tensors.

None detaches the teacher unless its method says so: compute the teacher's side under `torch.no_grad()`. All work in
fp32 or wider, whatever autocast and the inputs say. Where a paper and its official code differ in results, `variant`
names both, and the default is "code", which the published numbers and loss weights belong to.
"""

from limbeck.losses.affinity import affinity_mimicking, clip_loss
from limbeck.losses.contrastive import nt_xent
from limbeck.losses.embeddings import cosine_distance, embedding_mse, info_nce, similarity_kl
from limbeck.losses.features import attention_transfer, hcl, hint, similarity_preserving, simkd
from limbeck.losses.information import vid
from limbeck.losses.listwise import list_mle, p_list_mle, plackett_luce
from limbeck.losses.logits import (
    dist,
    dkd,
    jensen_shannon,
    kl,
    logit_mse,
    soft_cross_entropy,
    standardise,
    symmetric_kl,
)
from limbeck.losses.relations import crd, pkt, rkd_angle, rkd_distance

__all__ = [
    "affinity_mimicking",
    "attention_transfer",
    "clip_loss",
    "cosine_distance",
    "crd",
    "dist",
    "dkd",
    "embedding_mse",
    "hcl",
    "hint",
    "info_nce",
    "jensen_shannon",
    "kl",
    "list_mle",
    "logit_mse",
    "nt_xent",
    "p_list_mle",
    "pkt",
    "plackett_luce",
    "rkd_angle",
    "rkd_distance",
    "similarity_kl",
    "similarity_preserving",
    "simkd",
    "soft_cross_entropy",
    "standardise",
    "symmetric_kl",
    "vid",
]
