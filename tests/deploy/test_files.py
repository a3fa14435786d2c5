"""What can be said of the files in deploy/ without the engines that read them."""

from __future__ import annotations

import ast
import fnmatch
import json
import re
import shlex
import subprocess
import sys
import threading
import tomllib
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
import yaml

from tests.deploy.small import ROOT

DEPLOY = ROOT / "deploy"

# kserve 0.21's Python models: the names that a v1beta1 InferenceService may use, as far as ours does.
SERVICE = {"apiVersion", "kind", "metadata", "spec"}
PREDICTOR = {
    "canaryTrafficPercent", "containerConcurrency", "maxReplicas", "minReplicas", "model", "nodeSelector", "scaleMetric",
    "scaleTarget", "serviceAccountName", "terminationGracePeriodSeconds", "timeout", "tolerations",
}  # fmt: skip
MODEL = {
    "args", "env", "modelFormat", "protocolVersion", "resources", "runtime", "runtimeVersion", "securityContext", "storage",
    "storageUri",
}  # fmt: skip


def instructions() -> list[tuple[str, str]]:
    text = (DEPLOY / "Dockerfile").read_text(encoding="utf-8")
    lines = "\n".join(line for line in text.splitlines() if not line.startswith("#")).replace("\\\n", " ")
    return [(word, rest.strip()) for word, _, rest in (line.partition(" ") for line in lines.splitlines() if line)]


def test_the_image_runs_as_nobody_and_can_be_stopped_and_watched() -> None:
    steps = instructions()
    starts = [number for number, (word, _) in enumerate(steps) if word == "FROM"]
    assert len(starts) == 2
    assert all(re.match(r"python:3\.1[123]-slim", steps[start][1]) for start in starts)
    last = steps[starts[1] :]
    words = [word for word, _ in last]
    assert "RUN" not in words  # no compiler, no pip's cache, nothing that a layer would keep
    (user,) = (rest for word, rest in last if word == "USER")
    assert all(int(number) > 0 for number in user.split(":"))
    assert words.index("USER") < words.index("ENTRYPOINT")
    assert dict(last)["STOPSIGNAL"] == "SIGTERM"
    for word in ("ENTRYPOINT", "CMD"):  # exec form: a shell would swallow SIGTERM
        assert all(isinstance(part, str) for part in json.loads(dict(last)[word]))
    entry = json.loads(dict(last)["ENTRYPOINT"])
    assert entry[:2] == ["fgvc", "serve"]
    assert entry[entry.index("--port") + 1] == dict(last)["EXPOSE"]
    environment = dict(pair.split("=", 1) for word, rest in last if word == "ENV" for pair in shlex.split(rest))
    assert environment["PYTHONDONTWRITEBYTECODE"] == environment["ORT_DISABLE_TELEMETRY"] == "1"


def test_what_is_copied_is_there_and_not_ignored() -> None:
    ignored = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    allowed = {line[1:] for line in ignored if line.startswith("!")}
    sources = [
        source
        for word, rest in instructions()
        if word == "COPY" and not rest.startswith("--from")
        for source in rest.split()[:-1]
    ]
    assert set(sources) == allowed
    assert all((ROOT / source).exists() for source in sources)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    needed = {project["project"]["readme"], *project["project"]["license-files"]}
    needed |= set(project["tool"]["hatch"]["build"]["targets"]["wheel"]["force-include"])
    assert needed <= allowed  # or the wheel can't be built
    assert not any(fnmatch.fnmatch(source, line) for source in sources for line in ignored if "__pycache__" in line)


def serve_extra() -> list[str]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return project["optional-dependencies"].get("serve", [])


@pytest.mark.skipif(not serve_extra(), reason="fgvc serve is not in this version")
def test_the_entry_point_is_a_verb_with_these_options() -> None:
    import typer.main

    from fgvc.cli.app import app

    (install,) = (rest for word, rest in instructions() if word == "RUN")
    assert "'.[serve]'" in install
    verb = typer.main.get_command(app).commands["serve"]  # type: ignore[attr-defined]
    options = {option for parameter in verb.params for option in parameter.opts}
    used = {part for part in json.loads(dict(instructions())["ENTRYPOINT"]) if part.startswith("--")}
    assert used <= options


@pytest.mark.allow_hosts(["127.0.0.1"])
@pytest.mark.parametrize(("status", "healthy"), [(200, True), (503, False), (404, False)])
def test_the_health_check_asks_for_readiness(status: int, healthy: bool) -> None:
    paths = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            paths.append(self.path)
            self.send_response(status)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    (check,) = (rest for word, rest in instructions() if word == "HEALTHCHECK")
    command = ast.literal_eval(check.partition("CMD ")[2])
    assert command[0] == "python"
    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        code = command[2].replace(":8000", f":{server.server_port}")
        process = subprocess.run([sys.executable, "-c", code], capture_output=True, check=False)
        server.shutdown()
    assert (process.returncode == 0) == healthy
    assert paths == ["/v2/health/ready"]


def test_compose_shuts_the_container_in() -> None:
    (service,) = yaml.safe_load((DEPLOY / "compose.yaml").read_text(encoding="utf-8"))["services"].values()
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert {"cpus", "mem_limit", "pids_limit", "stop_grace_period", "tmpfs"} <= set(service)
    assert all(volume.endswith(":ro") for volume in service["volumes"])
    assert all(port.startswith("127.0.0.1:") for port in service["ports"])
    assert (DEPLOY / service["build"]["context"] / service["build"]["dockerfile"]).is_file()


def test_kserve_knows_every_field() -> None:
    tree = yaml.safe_load((DEPLOY / "kserve.yaml").read_text(encoding="utf-8"))
    assert set(tree) == SERVICE
    assert (tree["apiVersion"], tree["kind"]) == ("serving.kserve.io/v1beta1", "InferenceService")
    assert re.fullmatch("[a-z0-9]([-a-z0-9]*[a-z0-9])?", tree["metadata"]["name"])
    predictor = tree["spec"]["predictor"]
    assert set(predictor) <= PREDICTOR
    model = predictor["model"]
    assert set(model) <= MODEL
    assert set(model["modelFormat"]) <= {"name", "version"}
    assert (model["modelFormat"]["name"], model["runtime"]) == ("triton", "kserve-tritonserver")
    assert model["protocolVersion"] == "v2"
    year, month = model["runtimeVersion"].partition("-")[0].split(".")
    assert (int(year), int(month)) >= (24, 12)  # onnxruntime 1.20, fgvc's own floor; 23.05 can't read ONNX IR 10
    assert model["resources"]["limits"] == model["resources"]["requests"]


def test_serve_yaml_names_what_app_has() -> None:
    tree = yaml.safe_load((DEPLOY / "ray_serve/serve.yaml").read_text(encoding="utf-8"))
    (application,) = tree["applications"]
    module, _, builder = application["import_path"].partition(":")
    code = ast.parse((DEPLOY / "ray_serve" / f"{module}.py").read_text(encoding="utf-8"))
    defined = {node.name: node for node in code.body if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    (deployment,) = application["deployments"]
    assert {builder, deployment["name"]} <= set(defined)
    fields = {node.target.id for node in defined["Settings"].body if isinstance(node, ast.AnnAssign)}  # type: ignore[union-attr]
    assert set(application["args"]) == fields
    assert deployment["max_queued_requests"] > 0  # Ray's default is no bound at all
    scaling = deployment["autoscaling_config"]
    assert scaling["target_ongoing_requests"] < deployment["max_ongoing_requests"]
    # The same as in app.py, for those who run it without the file.
    (options,) = (node for node in defined["Classifier"].decorator_list if isinstance(node, ast.Call))
    own = {keyword.arg: ast.literal_eval(keyword.value) for keyword in options.keywords}
    assert own.pop("autoscaling_config").items() <= scaling.items()
    assert own.items() <= deployment.items()


def test_the_readme_names_files_that_exist() -> None:
    text = (DEPLOY / "README.md").read_text(encoding="utf-8")
    for name in re.findall(r"\]\(([\w./]+)\)", text):
        assert (DEPLOY / name).exists(), name
    for path in DEPLOY.rglob("*"):
        if path.is_file() and path.name != "README.md" and "__pycache__" not in path.parts:
            assert str(path.relative_to(DEPLOY)) in text, path
