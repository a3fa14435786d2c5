"""Ray Serve and Ray Data, really started on this machine, beside the engine itself."""

from __future__ import annotations

import csv
import json
import os
import socket
import subprocess
import sys
import time
import uuid
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from http.client import HTTPConnection
from io import BytesIO
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from fgvc.images.decode import decode
from fgvc.runtime.engine import Engine
from tests.deploy.small import ROOT, bundle, script

pytest.importorskip("ray", reason="needs the extra `ray`")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.allow_hosts(["127.0.0.1"]),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:ray"),  # of its own modules among each other
]
HERE = Path(__file__).parent


def paint(seed: int) -> Image.Image:
    rng = np.random.default_rng(seed)
    mean = rng.uniform(40, 215, 3)
    return Image.fromarray(np.clip(mean + rng.normal(0, 30, (60, 80, 3)), 0, 255).astype(np.uint8))


def picture(seed: int, kind: str = "JPEG") -> bytes:
    file = BytesIO()
    paint(seed).save(file, kind)
    return file.getvalue()


@pytest.fixture
def environment(tmp_path: Path) -> Iterator[dict[str, str]]:
    """Ray writes to the home folder (a token) and reports its use over the network; here it does neither. Afterwards: nothing
    that was started is left."""
    mark = uuid.uuid4().hex
    yield os.environ | {
        "HOME": str(tmp_path), "RAY_USAGE_STATS_ENABLED": "0", "FGVC_TEST": mark, "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "deploy/ray_serve")]),
    }  # fmt: skip
    until = time.monotonic() + 30
    while (left := marked(mark)) and time.monotonic() < until:
        time.sleep(0.2)
    assert not left


def marked(mark: str) -> list[str]:
    commands = []
    for place in Path("/proc").glob("[0-9]*"):
        try:
            if mark.encode() in (place / "environ").read_bytes():
                commands.append((place / "cmdline").read_bytes().replace(b"\0", b" ").decode())
        except OSError:  # gone meanwhile, or another user's
            continue
    return commands


def post(port: int, path: str, body: bytes) -> tuple[int, dict, str | None]:
    with closing(HTTPConnection("127.0.0.1", port, timeout=60)) as connection:
        connection.request("POST", path, body)
        answer = connection.getresponse()
        text = answer.read()
        return answer.status, json.loads(text) if text[:1] == b"{" else {}, answer.getheader("Retry-After")


def test_serve(tmp_path: Path, environment: dict[str, str]) -> None:
    model_bundle = bundle(tmp_path / "colours")
    engine = Engine(model_bundle, threads=1)
    with closing(socket.socket()) as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with (tmp_path / "stderr").open("w+") as errors:
        server = subprocess.Popen(
            [sys.executable, HERE / "session.py", model_bundle.folder, str(port)],
            env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True,
        )  # fmt: skip
        assert server.stdin
        assert server.stdout
        try:
            lines = []
            for line in server.stdout:
                lines.append(line.strip())
                if line == "ready\n":
                    break
            assert lines == ["file RUNNING 1", "narrow RUNNING 2", "ready"], (tmp_path / "stderr").read_text()[-3000:]
            same_answers(port, engine)
            refusals(port)
            overload(port, engine)
            same_answers(port, engine)  # as before
        finally:
            server.stdin.close()
            rest = server.stdout.read()
            server.stdout.close()
            code = server.wait(timeout=60)
        assert (rest.splitlines()[-1], code) == ("stopped", 0), (tmp_path / "stderr").read_text()[-3000:]


def same_answers(port: int, engine: Engine) -> None:
    for seed, kind in enumerate(["JPEG", "PNG", "WEBP", "BMP"] * 3):
        body = picture(seed, kind)
        expected = engine.classify([decode(body)], top_k=3)[0]
        status, answer, _ = post(port, "/v1/classify?top_k=3", body)
        assert (status, answer["model"], answer["rejected"]) == (200, "colours", expected.rejected)
        assert answer["calibrated"] is expected.calibrated
        assert [p["label"] for p in answer["predictions"]] == [p.label for p in expected.predictions]
        assert [p["index"] for p in answer["predictions"]] == [p.index for p in expected.predictions]
        assert [p["probability"] for p in answer["predictions"]] == pytest.approx(
            [p.probability for p in expected.predictions], abs=1e-6
        )


def refusals(port: int) -> None:
    bomb = BytesIO()
    Image.new("1", (8000, 8000)).save(bomb, "PNG")
    for expected, path, body in (
        (413, "/v1/classify", bytes(11 * 2**20)),
        (415, "/v1/classify", b"no picture"),
        (415, "/v1/classify", picture(0, "GIF")),
        (422, "/v1/classify", bomb.getvalue()),
        (422, "/v1/classify", picture(0)[:700]),
        (422, "/v1/classify", b""),
        (400, "/v1/classify?top_k=0", picture(0)),
        (400, "/v1/classify?top_k=" + "9" * 5000, picture(0)),
        (200, "/v1/classify?top_k=99", picture(0)),
    ):
        assert post(port, path, body)[0] == expected, (path[:40], len(body))


def overload(port: int, engine: Engine) -> None:
    """Ask for more than two replicas and two queues hold: each is answered rightly, or told to come again."""
    body = picture(1)
    expected = engine.classify([decode(body)])[0].predictions[0]
    with ThreadPoolExecutor(24) as pool:
        responses = list(pool.map(lambda _: post(port, "/narrow", body), range(200)))
    counted = Counter(status for status, _, _ in responses)
    assert set(counted) == {200, 503}, counted
    for status, answer, again in responses:
        if status == 200:
            assert answer["predictions"][0]["label"] == expected.label
        else:
            assert again == "1"
    assert post(port, "/narrow", body)[0] == 200


@pytest.mark.parametrize(("cpus", "threads"), [({"CPU": 2.0}, 2), ({"CPU": 0.5}, 1), ({}, 1)])
def test_onnxruntime_gets_the_replicas_cpus_as_threads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cpus: dict[str, float], threads: int
) -> None:
    app = script("ray_serve/app.py")
    context = SimpleNamespace(get_assigned_resources=lambda: cpus)
    monkeypatch.setattr(app.ray, "get_runtime_context", lambda: context)
    replica = app.Classifier.func_or_class(str(bundle(tmp_path / "b").folder))
    assert replica.engine.session.threads == threads
    replica.check_health()
    replica.engine.logits = lambda x: np.full((1, 3), np.nan)
    with pytest.raises(Exception, match="no numbers"):
        replica.check_health()


@pytest.mark.parametrize("suffix", [".parquet", ".csv"])
def test_scores(tmp_path: Path, environment: dict[str, str], suffix: str) -> None:
    """A folder to CSV, a list to Parquet, which has names that are not there, and none."""
    import pyarrow as pa
    from pyarrow import parquet

    model_bundle = bundle(tmp_path / "bundle")
    engine = Engine(model_bundle, threads=1)
    images = tmp_path / "images"
    (images / "蓝").mkdir(parents=True)
    for seed in range(50):
        (images / "蓝" / f"{seed:02d}.jpg").write_bytes(picture(seed))
    (images / "broken.jpg").write_bytes(picture(3)[:700])
    (images / "empty.png").touch()
    names: list[str | None] = sorted(str(path.relative_to(images)) for path in images.rglob("*.*g"))
    source, expected = images, [str(images / str(name)) for name in names]
    if suffix == ".parquet":
        source = tmp_path / "list.parquet"
        names = [*reversed(names), "none.jpg", None]
        parquet.write_table(pa.table({"other": range(len(names)), "path": names}), source)
        expected = names
    command = [sys.executable, ROOT / "deploy/ray_data/score.py", model_bundle.folder, source]
    written = []
    for number in range(2 if suffix == ".parquet" else 1):
        out = tmp_path / f"{number}{suffix}"
        process = subprocess.run(
            [*command, out, "--root", images], env=environment, capture_output=True, text=True, check=False
        )
        assert (process.returncode, process.stdout) == (1, f"{out}\n"), process.stderr[-3000:]
        written.append(out.read_bytes())
    assert len(set(written)) == 1

    if suffix == ".parquet":
        rows = parquet.read_table(out).to_pylist()
    else:
        with out.open(encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
    assert [row["path"] for row in rows] == expected
    errors = Counter(row["error"] for row in rows if row["error"])
    extra = {"missing": 1, "no path": 1} if suffix == ".parquet" else {}
    assert errors == {"truncated": 1, "empty": 1} | extra
    for row in rows:
        if not row["error"]:
            answer = engine.classify([decode(images / row["path"])], top_k=1)[0]
            best = answer.predictions[0]
            assert (row["label"], int(row["index"])) == (best.label, best.index)
            assert float(row["probability"]) == pytest.approx(best.probability, abs=1e-6)
            assert str(row["rejected"]).lower() == str(answer.rejected).lower()
            assert str(row["calibrated"]).lower() == str(answer.calibrated).lower()


def test_mistakes_of_scoring_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import pyarrow as pa
    from pyarrow import parquet

    score = script("ray_data/score.py")
    monkeypatch.setattr(score.ray, "cluster_resources", dict)
    folder = bundle(tmp_path / "b").folder
    parquet.write_table(pa.table({"file": ["a.jpg"]}), tmp_path / "no_path.parquet")
    parquet.write_table(pa.table({"path": [[1]]}), tmp_path / "numbers.parquet")
    (tmp_path / "text.parquet").write_text("no table")
    for source, out, reason in (
        ("no_path.parquet", "out.csv", "column `path`"),
        ("numbers.parquet", "out.csv", "column `path`"),
        ("text.parquet", "out.csv", "column `path`"),
        ("none.parquet", "out.csv", "column `path`"),
        ("none", "out.csv", "no such file or folder"),
        ("b", "out.json", "expected a name in"),
    ):
        with pytest.raises(score.FgvcError, match=reason):
            score.score(folder, tmp_path / source, tmp_path / out, root=tmp_path)
    assert not list(tmp_path.glob("*out*"))
