"""The dashboard asks for what is exported, and all of that; labels stay few."""

import json
import re
from pathlib import Path

from prefvec_ray.serving import metrics

DASHBOARD = json.loads((Path(__file__).parents[2] / "cluster" / "grafana" / "prefvec-serving.json").read_text())


def exported() -> dict[str, tuple[str, ...]]:
    """Series in Prometheus -> their labels."""
    series = {f"ray_{name}_total": tags for name, (_, tags) in metrics.COUNTERS.items()}
    series |= {f"ray_{name}": tags for name, (_, tags) in metrics.GAUGES.items()}
    return series | {f"ray_{name}_bucket": (*tags, "le") for name, (_, tags) in metrics.HISTOGRAMS.items()}


def test_every_query_names_what_is_exported_and_nothing_is_left_out():
    asked = [target["expr"] for panel in DASHBOARD["panels"] for target in panel["targets"]]
    asked += [each["query"] for each in DASHBOARD["templating"]["list"] if each["type"] == "query"]
    series, named = exported(), set()
    for query in asked:
        names = re.findall(r"\bray_\w+", query)
        assert names, query
        assert set(names) <= set(series), query
        named.update(names)
        labels = re.findall(r"\b(\w+)\s*(?:=~|!=|=)", query) + re.findall(
            r"\w+", "".join(re.findall(r"by \((.*?)\)", query))
        )
        for label in labels:
            assert all(label in series[name] for name in names), (label, query)
    assert named == set(series)


def test_panels_do_not_overlap():
    places = [panel["gridPos"] for panel in DASHBOARD["panels"]]
    cells = [(x, y) for p in places for x in range(p["x"], p["x"] + p["w"]) for y in range(p["y"], p["y"] + p["h"])]
    assert len(cells) == len(set(cells))
    assert len({panel["id"] for panel in DASHBOARD["panels"]}) == len(places)


def test_whatever_callers_ask_for_labels_stay_few():
    front = metrics.FrontMetrics("tiny")
    asked = [("tiny", False), ("tiny", True), ("tiny@cautious", False), ("tiny@cautious@2", False)]
    labels = [front._preset(model, free) for model, free in asked]
    assert labels == [metrics.DEFAULT, metrics.FREE, "cautious", "cautious"]
    many = {front._preset(f"tiny@p{i}", False) for i in range(1000)}
    assert len(many) == metrics.MOST_PRESETS
    assert metrics.OTHER in many
