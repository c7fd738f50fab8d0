"""Strong attacks, from torchattacks: APGD and FAB (arXiv 2003.01690, 1907.02044) and Square (1912.00049), the parts
of AutoAttack.

The library takes 4-D images in [0, 1], resets the global random state, leaves the model in another mode, and raises
IndexError below three or four classes. Here it is given what it wants, and everything is put back.
"""

import math
from typing import Any, Literal

import torch
from torch import Tensor, nn

from prefvec_ray.common.errors import InputError
from prefvec_ray.robustness.threat import Ball, Norm, attacked

Attack = Literal["apgd-ce", "apgd-t", "fab", "square"]
TARGETED_CLASSES = 4
"""The targeted DLR loss of APGD compares four logits."""
TARGETS = 9
"""Most classes that targeted APGD and FAB aim at, the likeliest first, as AutoAttack does."""


def strong_attack(
    name: Attack,
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    ball: Ball,
    *,
    classes: int,
    steps: int,
    seed: int = 0,
    batch: int = 256,
) -> Tensor:
    """An attacked copy of `x`, every row inside the ball. Rows that the attack gave up on come back unchanged.

    `steps` are gradient steps for each target, or queries for Square. Works for inputs of any shape and limits: they
    are mapped to a square image in [0, 1] and back. With two or three classes, `apgd-t` (whose loss needs four) is
    APGD on the cross-entropy with five restarts.

    The global random state and the model's mode are left as they were; the same seed gives the same answer.

    Raises:
        InputError: the attack is unknown, or torchattacks is not installed.
    """
    found = x.clone()
    if not len(x):
        return found
    frame = _Frame.of(x, ball)
    devices = [x.device] if x.device.type == "cuda" else []
    with attacked(model), torch.random.fork_rng(devices=devices):
        viewed = _Viewed(model, frame, x.device).eval()
        attack = _build(name, viewed, ball.norm, ball.epsilon / frame.scale, classes, steps, seed)
        for i in range(0, len(x), batch):
            part = x[i : i + batch]
            with torch.enable_grad():
                moved = attack(frame.to_image(part), y[i : i + batch]).detach()
            found[i : i + batch] = ball.project(frame.to_input(moved), part)
    return found


def _build(name: Attack, model: nn.Module, norm: Norm, epsilon: float, classes: int, steps: int, seed: int) -> Any:
    try:
        import torchattacks  # type: ignore[import-untyped]
    except ImportError:
        raise InputError(
            "strong attacks need torchattacks: pip install --no-deps torchattacks==3.5.1 (torchvision is not needed)"
        ) from None
    common = {"norm": {"linf": "Linf", "l2": "L2"}[norm], "eps": epsilon, "seed": seed}
    targets = min(classes, TARGETS + 1)  # the library counts the label's own class as well
    if name == "apgd-ce" or (name == "apgd-t" and classes < TARGETED_CLASSES):
        restarts = 1 if name == "apgd-ce" else 5
        return torchattacks.APGD(model, steps=steps, loss="ce", n_restarts=restarts, **common)
    if name == "apgd-t":
        return torchattacks.APGDT(model, steps=steps, n_classes=targets, **common)
    if name == "fab":
        return torchattacks.FAB(model, steps=steps, multi_targeted=True, n_classes=targets, **common)
    if name == "square":
        return torchattacks.Square(model, n_queries=steps, **common)
    raise InputError(f"unknown attack {name!r}; choose one of: apgd-ce, apgd-t, fab, square")


LEAST = {"linf": 1, "l2": 5}
"""The smallest side of an image that the library's Square takes: in L2 it divides by a fifth of it."""


class _Frame:
    """Inputs (N, ...) as square images in [0, 1], and back: u = (x - low) / scale.

    Square images stay as they are; a sequence (L, F) becomes F channels of tokens, so that Square's windows shift
    neighbouring tokens alike; anything else is flattened to one channel. The rest of the square is padding. Without
    limits the frame is wide enough that none of the ball is cut off.
    """

    def __init__(self, shape: torch.Size, low: float, scale: float, least: int) -> None:
        self.shape, self.low, self.scale = shape, low, scale
        self.square = len(shape) == 3 and shape[1] == shape[2] >= least
        self.channels = shape[1] if len(shape) == 2 else 1
        self.places = math.prod(shape) // self.channels
        self.side = max(least, math.isqrt(self.places - 1) + 1)

    @classmethod
    def of(cls, x: Tensor, ball: Ball) -> "_Frame":
        low = float(x.min()) - ball.epsilon if ball.low is None else ball.low
        high = float(x.max()) + ball.epsilon if ball.high is None else ball.high
        return cls(x.shape[1:], low, high - low, least=LEAST[ball.norm])

    def to_image(self, x: Tensor) -> Tensor:
        unit = ((x.float() - self.low) / self.scale).clamp(0, 1)
        if self.square:
            return unit.contiguous()
        rows = unit.reshape(len(x), self.places, self.channels).transpose(1, 2)
        padded = nn.functional.pad(rows, (0, self.side**2 - self.places), value=0.5)
        # FAB takes views of gradients, which fail on the transposed memory that a full square would keep.
        return padded.reshape(len(x), self.channels, self.side, self.side).contiguous()

    def to_input(self, image: Tensor) -> Tensor:
        if not self.square:
            image = image.flatten(2)[..., : self.places].transpose(1, 2).reshape(len(image), *self.shape)
        return self.low + self.scale * image


class _Viewed(nn.Module):
    """The model over framed images. The library reads the device from the parameter."""

    def __init__(self, model: nn.Module, frame: _Frame, device: torch.device) -> None:
        super().__init__()
        self.model, self.frame = model, frame
        self.device_marker = nn.Parameter(torch.zeros(1, device=device), requires_grad=False)

    def forward(self, image: Tensor) -> Tensor:
        return self.model(self.frame.to_input(image))
