"""The study's images and networks: scikit-learn's digits, which come with it, CIFAR-10 from a file or a folder, four
sizes of network."""

import math
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from prefvec_ray.common.errors import InputError
from prefvec_ray.common.extras import require

ARRAYS = ("x_train", "y_train", "x_test", "y_test")
UNPACKED = 1 << 30
"""Most bytes of all arrays of a file of images."""
_ZIP = (zipfile.BadZipFile, zlib.error)
Network = Literal["tiny", "small", "narrow", "resnet18"]
PICTURES = (".jpg", ".jpeg", ".png")


@dataclass(frozen=True)
class Images:
    """Float images in [0, 1], (N, C, H, W), and labels (N,), in three parts that share no image: to train on, to
    watch the training with, and to report on."""

    train: tuple[Tensor, Tensor]
    watch: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]
    classes: int


def load_images(
    data: str, classes: int, *, train: int | None = None, watch: int = 200, test: int = 300, merge: bool = False
) -> Images:
    """`data` is "digits"; a .npz file (x_train, y_train, x_test, y_test; uint8, N x 32 x 32 x 3 for CIFAR-10); a folder
    with one such file; or a folder of pictures, `train/CLASS/*.jpg` and `test/CLASS/*.jpg`.

    Only the first `classes` labels are kept. With `merge` every image stays, and neighbouring labels become one: the
    number of images does not change with that of the classes. The split is fixed: runs that differ in their seed alone
    are reported on the same images.

    Raises:
        InputError: no such file or arrays, values that are not 0 to 255, more classes than there are, or too few
        images for the parts.
    """
    if data == "digits":
        from sklearn.datasets import load_digits  # type: ignore[import-untyped]

        found = load_digits()
        x, y = torch.from_numpy(found.images).float().unsqueeze(1) / 16, torch.from_numpy(found.target).long()
        x_test = y_test = None
    else:
        x, y, x_test, y_test = _read(Path(data))
    known = int(y.max()) + 1
    if not 2 <= classes <= known:
        raise InputError(f"{classes} classes of {data}: expected 2 to {known}")
    if merge:
        y, y_test = y * classes // known, None if y_test is None else y_test * classes // known
    x, y = _shuffled(x, y, classes)
    if x_test is None or y_test is None:
        x_test, y_test, x, y = x[:test], y[:test], x[test:], y[test:]
    else:
        x_test, y_test = (part[:test] for part in _shuffled(x_test, y_test, classes))
    if len(x) <= watch or len(x_test) < test:
        raise InputError(
            f"{data} has {len(x)} and {len(x_test)} images of {classes} classes: fewer than {watch} + {test}"
        )
    end = None if train is None else watch + train
    return Images((x[watch:end], y[watch:end]), (x[:watch], y[:watch]), (x_test, y_test), classes)


def _read(path: Path) -> tuple[Tensor, ...]:
    """Images and labels to train on, images and labels to test on."""
    if not path.exists():
        raise InputError(f"images {path}: no such file; give `digits`, a .npz of CIFAR-10, or a folder of pictures")
    if path.is_dir():
        files = sorted(path.glob("*.npz"))
        if not files:
            x, y, names = _pictures(path / "train")
            x_test, y_test, others = _pictures(path / "test")
            if names != others:
                raise InputError(f"images {path}: train/ and test/ hold different classes: {', '.join(names ^ others)}")
            return x, y, x_test, y_test
        if len(files) > 1:
            raise InputError(f"images {path}: {len(files)} .npz files, such as {files[0].name}; give one of them")
        path = files[0]
    return _read_npz(path)


def _pictures(folder: Path) -> tuple[Tensor, Tensor, set[str]]:
    """The pictures of the folders in `folder`, a class each, in the order of their names."""
    require("robustness", "PIL")
    from PIL import Image, UnidentifiedImageError

    names = sorted(part.name for part in folder.iterdir() if part.is_dir()) if folder.is_dir() else []
    arrays, labels = [], []
    for label, name in enumerate(names):
        for file in sorted(part for part in (folder / name).iterdir() if part.suffix.lower() in PICTURES):
            try:
                with Image.open(file) as picture:
                    arrays.append(np.asarray(picture.convert("RGB")))
            except (UnidentifiedImageError, OSError, Image.DecompressionBombError) as error:
                raise InputError(f"images {file}: not a readable picture ({error!s:.100})") from error
            labels.append(label)
            if arrays[-1].shape != arrays[0].shape:
                raise InputError(f"images {file}: {arrays[-1].shape}, others are {arrays[0].shape}; give one size")
    if not arrays:
        raise InputError(f"images {folder}: no CLASS/*.jpg or .png there; expected train/CLASS/ and test/CLASS/")
    return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).float() / 255, torch.tensor(labels), set(names)


def _read_npz(path: Path) -> tuple[Tensor, ...]:
    try:
        x, y, x_test, y_test = _arrays(path)
    except InputError:
        raise
    # Of numpy, zipfile and zlib; a header may state any shape, so that there is no memory for it.
    except (ValueError, OSError, EOFError, KeyError, TypeError, RuntimeError, MemoryError, *_ZIP) as error:
        raise InputError(f"images {path}: not a sound .npz file ({error!s:.200}); copy it again") from error
    for images, labels in ((x, y), (x_test, y_test)):
        if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] not in (1, 3) or not images.size:
            raise InputError(f"images {path}: {images.dtype} of shape {images.shape}; expected uint8, N x H x W x 3")
        if labels.dtype.kind not in "iu" or labels.size != len(images) or labels.min() < 0 or labels.max() > 9999:
            raise InputError(
                f"images {path}: labels {labels.dtype} of shape {labels.shape}; expected {len(images)} integers of 0 to"
                " 9999"
            )
    pictures = (torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255 for images in (x, x_test))
    labels = (torch.from_numpy(part).long().flatten() for part in (y, y_test))
    (a, b), (c, d) = pictures, labels
    return a, c, b, d


def _arrays(path: Path) -> tuple[Any, ...]:
    """The four arrays of the file; InputError where they would take more than `UNPACKED` bytes."""
    with zipfile.ZipFile(path) as members:
        size = sum(member.file_size for member in members.infolist())
        sizes = {member.filename: member.file_size for member in members.infolist()}
        missing = sorted(name for name in ARRAYS if f"{name}.npy" not in sizes)
        if missing:
            raise InputError(f"images {path}: has no {', '.join(missing)}; expected {', '.join(ARRAYS)}")
        if size > UNPACKED:
            raise InputError(f"images {path}: {size >> 20} MiB unpacked; expected at most {UNPACKED >> 20}")
        for name in ARRAYS:
            with members.open(f"{name}.npy") as file:
                version = np.lib.format.read_magic(file)
                read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
                shape, _, dtype = read(file)
                if math.prod(shape) * dtype.itemsize > sizes[f"{name}.npy"]:
                    raise InputError(f"images {path}: {name} states the shape {shape}, which it does not hold")
    with np.load(path, allow_pickle=False) as arrays:
        return tuple(arrays[name] for name in ARRAYS)


def _shuffled(x: Tensor, y: Tensor, classes: int) -> tuple[Tensor, Tensor]:
    kept = (y < classes).nonzero().flatten()
    kept = kept[torch.randperm(len(kept), generator=torch.Generator().manual_seed(0))]
    return x[kept].contiguous(), y[kept]


def build_network(name: Network, channels: int, classes: int) -> nn.Module:
    """A fresh network, drawn from torch's random state. `tiny` is for 8 x 8 digits (7,000 parameters), `small` for
    CIFAR on a CPU (100,000), `resnet18` is the paper's size (11 million, transformers' ResNet with a 3 x 3 stem, as
    CIFAR needs). `narrow` is a ResNet-18 for a CPU: a quarter of the width (700,000), and half the resolution from the
    stem on.

    The two ResNets lie in memory channels last, which is faster; their numbers are those of the usual layout but for
    rounding in fp32."""
    if name in ("narrow", "resnet18"):
        width, stride = (16, 2) if name == "narrow" else (64, 1)
        network = _ResNet18(channels, classes, width, stride)
        return network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    a, b, c = (8, 16, 32) if name == "tiny" else (16, 32, 64)

    def block(into: int, out: int, stride: int) -> list[nn.Module]:
        return [nn.Conv2d(into, out, 3, stride, 1, bias=False), nn.BatchNorm2d(out), nn.ReLU()]

    pool = [nn.Flatten()] if name == "tiny" else [*block(c, 2 * c, 2), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    last = 4 * c if name == "tiny" else 2 * c
    return nn.Sequential(
        *block(channels, a, 1), *block(a, b, 2), *block(b, c, 2), *pool, nn.Linear(last, classes)
    )  # fmt: skip


class _ResNet18(nn.Module):
    def __init__(self, channels: int, classes: int, width: int, stride: int) -> None:
        super().__init__()
        from transformers import ResNetConfig, ResNetModel

        widths = [width, 2 * width, 4 * width, 8 * width]
        config = ResNetConfig(
            num_channels=channels, embedding_size=width, hidden_sizes=widths, depths=[2, 2, 2, 2], layer_type="basic"
        )
        self.body = ResNetModel(config)
        stem = self.body.embedder.embedder
        stem.convolution = nn.Conv2d(channels, width, 3, stride, 1, bias=False)
        self.body.embedder.pooler = nn.Identity()
        self.head = nn.Linear(widths[-1], classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x).pooler_output.flatten(1))
