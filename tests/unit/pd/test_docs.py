"""The documents name files that exist, and the shipped configuration is valid."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path

import jsonschema
import pytest
import ray.autoscaler
import yaml

from pd.cli import app
from pd.spec import ClusterSpec, load_spec, parse_spec

ROOT = Path(__file__).parents[3]
DOCUMENTS = sorted([ROOT / "README.md", *(ROOT / "docs").glob("**/*.md")])
_FILE_NAME = re.compile(
    r"\.?[\w-][\w./-]*(\.(py|md|ya?ml|toml|txt|json|sh|jinja)|/)|\.ci/run|Makefile|LICENSE"
)


def text_of(document: Path) -> str:
    """Without code blocks: those show what users write."""
    return re.sub(r"```.*?```", "", document.read_text(), flags=re.DOTALL)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_named_files_exist(document: Path) -> None:
    names = re.findall(r"`([^`\n]+)`", text_of(document))
    files = [name for name in names if _FILE_NAME.fullmatch(name)]
    missing = [name for name in files if not (ROOT / name).exists()]
    assert missing == []


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(document: Path) -> None:
    targets = re.findall(r"\]\(([^)#]+)\)", text_of(document))
    local = [target for target in targets if not target.startswith("https://")]
    assert [target for target in local if not (document.parent / target).exists()] == []


def test_commands_in_the_readme_exist() -> None:
    callbacks = [command.callback for command in app.registered_commands]
    commands = {callback.__name__ for callback in callbacks if callback}
    commands |= {group.name for group in app.registered_groups if group.name}
    named = set(re.findall(r"`pd (\w+)", (ROOT / "README.md").read_text()))
    assert named
    assert named <= commands


def test_make_targets_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"^([a-z-]+):", makefile, flags=re.MULTILINE))
    named = set(re.findall(r"make ([a-z-]+)", (ROOT / "README.md").read_text()))
    (loop,) = re.findall(r"for target in ([a-z -]+);", (ROOT / ".ci" / "run").read_text())
    assert named | set(loop.split()) <= targets


def test_the_readmes_spec_is_the_example() -> None:
    readme = (ROOT / "README.md").read_text()
    whole, *parts = re.findall(r"```yaml\n(.*?)```", readme, flags=re.DOTALL)
    assert parse_spec(whole, "README.md") == parse_spec(
        (ROOT / "examples" / "local.yaml").read_text(), "local.yaml"
    )
    for part in parts:
        parse_spec("model: {path: nowhere}\n" + part, "README.md")


def test_the_readmes_errors_are_real(tmp_path: Path) -> None:
    text = (ROOT / "README.md").read_text()
    for line in re.findall(r"^pd: bad\.yaml:\d+: (.*)$", text, flags=re.MULTILINE):
        key, _, value = line.partition(": ")
        assert key.startswith("roles.prefill.")
        spec = "model: {path: a}\nroles: {decode: {}, prefill: {replicas: two, pages: 3}}"
        with pytest.raises(ValueError, match=re.escape(f"{key}: {value}")):
            parse_spec(spec, "bad.yaml")


def test_ray_cluster() -> None:
    cluster = yaml.safe_load((ROOT / "ray_cluster.yaml").read_text())
    schema = Path(ray.autoscaler.__file__).parent / "ray-schema.json"
    jsonschema.validate(cluster, json.loads(schema.read_text()))
    types = cluster["available_node_types"]
    assert cluster["head_node_type"] in types
    assert set(types) == {"head", "prefill", "decode"}


def test_ray_cluster_has_what_the_example_asks_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PAGERELAY_API_KEY", "key")
    spec: ClusterSpec = load_spec(ROOT / "examples" / "several-nodes.yaml")
    types = yaml.safe_load((ROOT / "ray_cluster.yaml").read_text())["available_node_types"]
    for role, role_spec in spec.roles.items():
        node = types[role]
        assert node["labels"].items() >= role_spec.labels.items()
        assert node["max_workers"] >= role_spec.replicas.max
        for name, amount in role_spec.rank_resources().items():
            assert node["resources"][name] >= amount


def test_ci_is_a_valid_script() -> None:
    subprocess.run(["bash", "-n", str(ROOT / ".ci" / "run")], check=True)
