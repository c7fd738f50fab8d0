"""Where something came from, as a graph: a served fingerprint or preset, its vectors, their two runs, their data."""

from typing import TYPE_CHECKING, Literal

from pydantic import BaseModel, ConfigDict

from prefvec_ray.common.errors import InputError
from prefvec_ray.common.names import WHOLE
from prefvec_ray.common.text import mermaid_label
from prefvec_ray.registry.records import PresetVersion, Served, VectorVersion

if TYPE_CHECKING:
    from prefvec_ray.registry.catalog import Catalog

Kind = Literal["served", "preset", "vector", "delta", "base", "data"]


class Node(BaseModel):
    """`id` is a digest, or `preset:<reference>`; `refs` are the published versions with that digest."""

    model_config = ConfigDict(frozen=True)

    id: str
    kind: Kind
    refs: tuple[str, ...] = ()


class Edge(BaseModel):
    """`child` was made from `parent`; `role` says how: a coefficient, a polarity, `base` or `data`."""

    model_config = ConfigDict(frozen=True)

    child: str
    parent: str
    role: str


class Lineage(BaseModel):
    """Nodes from what was asked for (first) back to base and data."""

    model_config = ConfigDict(frozen=True)

    nodes: tuple[Node, ...]
    edges: tuple[Edge, ...]

    def ids(self, kind: Kind) -> list[str]:
        return [node.id for node in self.nodes if node.kind == kind]

    def to_mermaid(self) -> str:
        """For a model card or a README."""
        short = {node.id: f"n{index}" for index, node in enumerate(self.nodes)}
        lines = [f"  {short[n.id]}[{mermaid_label([n.kind, ', '.join(n.refs) or n.id[:19]])}]" for n in self.nodes]
        lines += [f"  {short[e.parent]} -->|{mermaid_label([e.role])}| {short[e.child]}" for e in self.edges]
        return "\n".join(["graph TD", *lines])


def lineage(catalog: "Catalog", what: str) -> Lineage:
    """The graph behind a served fingerprint (`blake3:…`), a preset or a vector (`name`, `name@version`, `name@alias`).

    A name that is both a vector and a preset means the vector; say `preset:<name>` for the other. Deltas that were
    published are followed on to their own data. InputError where nothing of that name or fingerprint is known.
    """
    published: dict[str, list[VectorVersion]] = {}
    for _, manifest, _ in catalog.all_vectors():
        if manifest is not None:
            published.setdefault(manifest.digest, []).append(manifest)
    graph = _Graph(published)
    if what.startswith("blake3:"):
        preset = next((preset for preset in _all_presets(catalog) if preset.fingerprint == what), None)
        served = catalog.served(what) or preset
        if served is not None:
            graph.combination(what, "served", served)
        elif what in published:
            graph.vector(what, "vector")
        else:
            raise InputError(f"{what}: no served fingerprint, preset or vector with this digest is recorded here")
    elif what.startswith("preset:") or what.partition("@")[0] not in catalog.names():
        found = catalog.resolve_preset(what.removeprefix("preset:"))
        graph.combination(f"preset:{found.ref}", "preset", found)
    else:
        graph.vector(catalog.resolve(what).digest, "vector")
    return Lineage(nodes=tuple(graph.nodes.values()), edges=tuple(dict.fromkeys(graph.edges)))


def _all_presets(catalog: "Catalog") -> list[PresetVersion]:
    names = catalog.names("presets")
    return [catalog.resolve_preset(f"{n}@{v}") for n in names for v in reversed(catalog.versions(n, "presets"))]


class _Graph:
    def __init__(self, published: dict[str, list[VectorVersion]]):
        self.published = published
        self.nodes: dict[str, Node] = {}
        self.edges: list[Edge] = []

    def combination(self, identity: str, kind: Kind, record: PresetVersion | Served) -> None:
        refs = (record.ref,) if isinstance(record, PresetVersion) else ()
        self.nodes[identity] = Node(id=identity, kind=kind, refs=refs)
        for ref, digest in record.vectors.items():
            self.edges.append(Edge(child=identity, parent=digest, role=f"{record.coefficients[ref]:g} x {ref}"))
            self.vector(digest, "vector")
        self._leaf(identity, record.base_fingerprint, "base")

    def vector(self, digest: str, kind: Kind) -> None:
        if digest in self.nodes:
            return
        versions = self.published.get(digest, [])
        self.nodes[digest] = Node(id=digest, kind=kind, refs=tuple(version.ref for version in versions))
        for version in versions:
            for polarity, parent in version.parents.items():
                self.edges.append(Edge(child=digest, parent=parent, role=polarity))
                self.vector(parent, "vector" if polarity == WHOLE else "delta")
            self._leaf(digest, version.base_fingerprint, "base")
            if version.data_digest:
                self._leaf(digest, version.data_digest, "data")

    def _leaf(self, child: str, identity: str, kind: Kind) -> None:
        self.nodes.setdefault(identity, Node(id=identity, kind=kind))
        self.edges.append(Edge(child=child, parent=identity, role=kind))
