"""Robustness that is not overestimated: TRADES, FOSC, strong attacks, the audit of a classifier, and the study of
TRADES.

    found = audit(model, images, labels, Ball(8 / 255))
    found.verdict, found.reason

Plain torch, over any classifier and any input space; Ray only in `study`.
"""

from prefvec_ray.common.extras import require

require("robustness", "scipy")

from prefvec_ray.robustness.attacks import strong_attack
from prefvec_ray.robustness.audit import Audit, Ladder, audit
from prefvec_ray.robustness.losses import adversarial_loss, pgd, trades_loss
from prefvec_ray.robustness.metrics import fosc, fosc_within, probe, relative, sgcs
from prefvec_ray.robustness.threat import Ball
from prefvec_ray.robustness.train import Recipe, Remedy, train_classifier

__all__ = [
    "Audit",
    "Ball",
    "Ladder",
    "Recipe",
    "Remedy",
    "adversarial_loss",
    "audit",
    "fosc",
    "fosc_within",
    "pgd",
    "probe",
    "relative",
    "sgcs",
    "strong_attack",
    "trades_loss",
    "train_classifier",
]
