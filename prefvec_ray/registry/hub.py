"""A published vector as a folder that `huggingface_hub` can push, with a model card.

The card is generated. Its statements were compared with the bytes; text of the publisher stands in code blocks.
"""

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from prefvec_ray.common.atomic import new_folder
from prefvec_ray.common.errors import InputError
from prefvec_ray.common.names import WHOLE
from prefvec_ray.common.text import fenced, markdown_cell, markdown_code
from prefvec_ray.registry.blobs import hash_file
from prefvec_ray.registry.errors import StoreError
from prefvec_ray.registry.records import VectorVersion

if TYPE_CHECKING:
    from prefvec_ray.registry.registry import Registry

CARD, MANIFEST = "README.md", "prefvec.json"


def export_huggingface(registry: "Registry", ref: str, out: str | Path, *, base_model: str | None = None) -> Path:
    """A folder that `huggingface_hub` can push: the vector's files, a model card, the manifest as `prefvec.json`.

    `base_model` is the base's name on the hub, which a fingerprint does not tell. The card is always this function's: a
    README.md or prefvec.json among the publisher's files is kept as `README.publisher.md`. `publish_vector` takes the
    folder back. Raises InputError where `out` is not empty.
    """
    version, out = registry.resolve(ref), Path(out)
    if out.exists() and any(out.iterdir()):
        raise InputError(f"{out}: is not empty; choose a new folder")
    with registry.fetched(version) as folder, new_folder(out, replaces=lambda out: not any(out.iterdir())) as inside:
        taken = {CARD, MANIFEST, *(file.name for file in version.files)}
        renamed = {}
        for file in version.files:
            name = _free_name(file.name, taken) if file.name in (CARD, MANIFEST) else file.name
            renamed[file.name] = name
            shutil.copyfile(folder / file.name, inside / name)
            if hash_file(inside / name) != file.digest:
                raise StoreError(f"{version.ref}: {file.name} changed while it was copied; try again")
        manifest = version.model_dump(mode="json")
        (inside / MANIFEST).write_text(json.dumps(manifest, indent=1, sort_keys=True), "utf-8")
        (inside / CARD).write_text(_card(registry, version, base_model, renamed.get(CARD)), "utf-8")
    return out


def _free_name(name: str, taken: set[str]) -> str:
    """`README.md` -> `README.publisher.md`, or with a number where that is taken too."""
    stem, dot, ending = name.rpartition(".")
    candidates = (f"{stem}.publisher{number or ''}{dot}{ending}" for number in range(len(taken) + 1))
    free = next(candidate for candidate in candidates if candidate not in taken)
    taken.add(free)
    return free


def _card(registry: "Registry", version: VectorVersion, base_model: str | None, readme: str | None) -> str:
    from huggingface_hub import ModelCardData

    data = ModelCardData(
        license=version.license or None,
        library_name="prefvec-ray",
        base_model=base_model,
        tags=["preference-vector", "task-arithmetic", "alignment"],
    )
    rows = {
        "preference": markdown_cell(version.preference),
        "published as": markdown_cell(version.ref),
        "form": f"{version.form}, {version.dtype}" + (f", rank {version.rank}" if version.rank else ""),
        "digest": markdown_code(version.digest),
        "base fingerprint": markdown_code(version.base_fingerprint),
        "data digest": markdown_code(version.data_digest) if version.data_digest else "not stated",
        **{_made_of(parent): markdown_code(digest) for parent, digest in version.parents.items()},
    }
    table = "\n".join(f"| {key} | {value} |" for key, value in rows.items())
    facts = {"Recipe": version.recipe, "Metrics": version.metrics, "Precision": version.precision}
    sections = [
        f"## {heading}\n\n{fenced(json.dumps(values, indent=1, sort_keys=True), 'json')}"
        for heading, values in facts.items()
        if values
    ]
    notes = [f"## The publisher's notes\n\n{fenced(version.notes, 'text')}"] if version.notes else []
    notes += [f"The publisher's own page is `{readme}`."] if readme else []
    graph = f"## Lineage\n\n```mermaid\n{registry.lineage(version.ref).to_mermaid()}\n```"
    intro = (
        "A preference vector (Liang et al., arXiv 2504.20106): the difference of two models that were trained for and"
        " against a preference. Add it to its base model, times a coefficient of your choice:"
    )
    code = (
        "```python\nfrom prefvec_ray.vectors import LiveModel, load_vector\n\n"
        f'live = LiveModel(model, {{"{version.preference}": load_vector("this-folder")}})\n'
        f'live.set_coefficients({{"{version.preference}": 0.7}})\n```'
    )
    head = f"---\n{data.to_yaml()}\n---\n\n# {version.preference}"
    return "\n\n".join([head, intro, code, f"| | |\n|---|---|\n{table}", *sections, *notes, graph]) + "\n"


def _made_of(parent: str) -> str:
    return "part of" if parent == WHOLE else f"{markdown_cell(parent)} run"
