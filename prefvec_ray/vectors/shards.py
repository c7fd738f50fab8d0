"""Reading sharded safetensors folders with care: only safetensors, only inside the folder, only what the index says.

Shared by vector files (`vector*.safetensors`) and base checkpoints (`model*.safetensors`). Tensors are memory-mapped
(copy on write): opening costs the headers, reading a tensor costs the pages that are touched.
"""

from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from prefvec_ray.common.errors import InputError
from prefvec_ray.common.files import read_json
from prefvec_ray.common.text import printable

PICKLES = {".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle"}


class Shards:
    """The tensors of one safetensors file, or of a folder `<stem>.safetensors[.index.json]`, read lazily.

    `links=False` also refuses files that are symbolic links to outside the folder. (The Hugging Face cache is made of
    such links, so base checkpoints allow them; vectors do not.) Raises InputError for anything that cannot be trusted:
    no safetensors, pickles, index entries outside the folder, truncated or tampered headers, an index that disagrees
    with its shards.
    """

    def __init__(self, path: str | Path, *, stem: str, links: bool = False):
        self.path = Path(path)
        self.files, weight_map = locate(self.path, stem)
        self._handles = {file.name: _open(file, self.path, links) for file in self.files}
        self._where: dict[str, str] = {}
        for file_name, handle in self._handles.items():
            for name in handle.keys():  # noqa: SIM118 - a safe_open handle is not a dict
                if name in self._where:
                    raise InputError(f"{self.path}: '{printable(name)}' is in both {self._where[name]} and {file_name}")
                self._where[name] = file_name
        if weight_map is not None and weight_map != self._where:
            wrong = min({k for k, _ in weight_map.items() ^ self._where.items()})
            raise InputError(
                f"{self.path}: the index and the shards disagree about '{printable(wrong)}'; copy it again"
            )

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._where))

    def __contains__(self, name: object) -> bool:
        return name in self._where

    def __len__(self) -> int:
        return len(self._where)

    def tensor(self, name: str) -> Tensor:
        """The tensor, as a view of the mapped file."""
        return self._handles[self._where[name]].get_tensor(name)

    def shape_dtype(self, name: str) -> tuple[tuple[int, ...], str]:
        """Shape and safetensors dtype code (`F32`, `BF16` ...) from the header alone."""
        piece = self._handles[self._where[name]].get_slice(name)
        return tuple(piece.get_shape()), piece.get_dtype()

    def contents(self) -> Iterator[tuple[str, bytes, list[str]]]:
        """Name of every file, its header (with the length before it), and the tensors that follow it, in their order.

        Header and tensors are all bytes of the file.
        """
        for path in self.files:
            with path.open("rb") as file:
                length = file.read(8)
                header = length + file.read(int.from_bytes(length, "little"))
            yield path.name, header, self._handles[path.name].offset_keys()

    def metadata(self) -> dict[str, dict[str, str]]:
        """file name -> its `__metadata__`"""
        return {name: dict(handle.metadata() or {}) for name, handle in self._handles.items()}


def locate(path: Path, stem: str) -> tuple[list[Path], dict[str, str] | None]:
    """The files to open and, for a sharded folder, the index's map from tensor name to file name."""
    if path.suffix in PICKLES:
        raise InputError(f"{path}: pickle files can run code and are never read; convert it to safetensors first")
    if path.is_file():
        if path.suffix != ".safetensors":
            raise InputError(f"{path}: not a .safetensors file; give a folder or a .safetensors file")
        return [path], None
    if not path.is_dir():
        raise InputError(f"{path}: no such file or folder")
    single, index = path / f"{stem}.safetensors", path / f"{stem}.safetensors.index.json"
    if index.is_file():
        if single.is_file():  # transformers loads the single file, whatever the index says
            both = f"{single.name} and the shards of {index.name}"
            raise InputError(f"{path}: holds two models, {both}; remove the one that is out of date")
        weight_map = _read_index(index)
        return [path / name for name in sorted(set(weight_map.values()))], weight_map
    if single.is_file():
        return [single], None
    pickles = sorted(file.name for file in path.iterdir() if file.suffix in PICKLES)
    hint = f" (found {pickles[0]}, a pickle: convert it to safetensors first)" if pickles else ""
    raise InputError(f"{path}: holds neither {single.name} nor {index.name}{hint}")


def _read_index(index: Path) -> dict[str, str]:
    weight_map = read_json(index, "not a safetensors index; copy the folder again").get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(n, str) for n in weight_map.values()):
        raise InputError(f"{index}: not a safetensors index with a 'weight_map' of names; copy the folder again")
    for name in set(weight_map.values()):
        if (
            Path(name).name != name
            or len(name.encode("utf-8", "replace")) > 255
            or "\0" in name
            or "\\" in name
            or not name.endswith(".safetensors")
        ):
            raise InputError(
                f"{index}: points to '{printable(name)}'; expected names of .safetensors files beside the index"
            )
    return weight_map


def _open(file: Path, root: Path, links: bool) -> safe_open:
    if not file.is_file():
        raise InputError(f"{file}: the index names this file but it is missing; copy the folder again")
    if root.is_dir() and not links and not file.resolve().is_relative_to(root.resolve()):
        raise InputError(f"{file}: is a link to outside its folder; copy the file itself")
    try:
        return safe_open(file, framework="pt")
    except (SafetensorError, OSError, ValueError) as error:
        raise InputError(f"{file}: not a sound safetensors file ({printable(error)}); copy or make it again") from None
