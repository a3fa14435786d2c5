"""Triton's repository, by Triton's own schema, and its client."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from google.protobuf import text_format
from PIL import Image

from fgvc.cli.app import main
from fgvc.config.images import Preprocess
from fgvc.errors import FgvcError
from fgvc.exporting.triton import config, write_model
from fgvc.runtime.bundle import load_bundle, write_bundle
from fgvc.runtime.engine import Engine, file_of
from tests.deploy.small import SIZE, bundle, network, script
from tests.models.onnxnet import small


@pytest.fixture(scope="module")
def schema() -> ModuleType:
    """tritonclient's messages; its `grpc` package would want grpcio, which they don't."""
    package = importlib.util.find_spec("tritonclient")
    assert package
    assert package.submodule_search_locations
    place = Path(package.submodule_search_locations[0]) / "grpc/model_config_pb2.py"
    spec = importlib.util.spec_from_file_location("model_config_pb2", place)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def parsed(schema: ModuleType, text: str):
    return text_format.Parse(text, schema.ModelConfig())


def test_the_repository_is_what_triton_reads(tmp_path: Path, schema: ModuleType) -> None:
    model_bundle = bundle(tmp_path / "colours")
    place = write_model(model_bundle, tmp_path / "new/repository", device="cpu", instances=3)
    assert place == tmp_path / "new/repository/colours"
    assert sorted(str(p.relative_to(place)) for p in place.rglob("*") if p.is_file()) == [
        "1/model.onnx", "calibration.json", "config.pbtxt", "labels.json", "labels.txt", "preprocess.json",
    ]  # fmt: skip
    assert [p.name for p in place.parent.iterdir()] == ["colours"]  # no scratch left
    assert (place / "1/model.onnx").read_bytes() == model_bundle.model.read_bytes()
    assert (place / "labels.txt").read_text(encoding="utf-8").split("\n") == ["red", "green", "蓝", ""]

    settings = parsed(schema, (place / "config.pbtxt").read_text(encoding="utf-8"))
    assert (settings.name, settings.platform, settings.max_batch_size) == ("colours", "onnxruntime_onnx", 16)
    (source,), (target,) = settings.input, settings.output
    assert (source.name, source.data_type, list(source.dims)) == ("input", schema.TYPE_FP32, [3, SIZE, SIZE])
    assert (target.name, target.data_type, list(target.dims)) == ("logits", schema.TYPE_FP32, [3])
    assert target.label_filename == "labels.txt"
    assert settings.version_policy.latest.num_versions == 1
    (group,) = settings.instance_group
    assert (group.kind, group.count) == (schema.ModelInstanceGroup.KIND_CPU, 3)
    assert settings.parameters["intra_op_thread_count"].string_value == "1"
    queue = settings.dynamic_batching.default_queue_policy
    assert queue.max_queue_size == 64
    assert queue.timeout_action == schema.ModelQueuePolicy.REJECT
    assert queue.default_timeout_microseconds == 2_000_000
    assert not settings.dynamic_batching.preferred_batch_size  # Triton advises against it


def test_a_schema_that_does_not_know_a_field_says_so(schema: ModuleType) -> None:
    """The check itself can fail."""
    with pytest.raises(text_format.ParseError):
        parsed(schema, 'name: "a" max_queue: 3')


def test_a_fixed_batch_is_part_of_the_sizes(tmp_path: Path, schema: ModuleType) -> None:
    model_bundle = bundle(tmp_path / "b", network(4))
    settings = parsed(schema, config(model_bundle, name="b", device="auto", instances=1))
    assert settings.max_batch_size == 0
    assert list(settings.input[0].dims) == [4, 3, SIZE, SIZE]
    assert list(settings.output[0].dims) == [4, 3]
    assert not settings.HasField("dynamic_batching")


def test_names_may_be_anything(tmp_path: Path, schema: ModuleType) -> None:
    names = ('in"put\\', "对数\n")
    settings = parsed(schema, config(bundle(tmp_path / "b", network(names=names)), name="b", device="gpu", instances=1))
    assert (settings.input[0].name, settings.output[0].name) == names
    assert settings.instance_group[0].kind == schema.ModelInstanceGroup.KIND_GPU


def test_refusals_leave_nothing(tmp_path: Path) -> None:
    model_bundle = bundle(tmp_path / "b")
    repository = tmp_path / "repository"
    for name in ("..", "a/b", "", ".hidden", "鸟"):
        with pytest.raises(FgvcError, match="not a model's name"):
            write_model(model_bundle, repository, name=name)
    with pytest.raises(FgvcError, match="has a line break"):
        write_model(bundle(tmp_path / "lines", labels=("a", "b\nc", "d")), repository)
    with pytest.raises(FgvcError, match="onnxruntime can't load"):
        write_model(bundle(tmp_path / "broken", b"no model"), repository)
    assert not repository.exists()
    place = write_model(model_bundle, repository)
    before = {path: path.read_bytes() for path in place.rglob("*") if path.is_file()}
    with pytest.raises(FgvcError, match="exists already"):
        write_model(model_bundle, repository)
    assert before == {path: path.read_bytes() for path in place.rglob("*") if path.is_file()}


def test_a_full_disk_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model_bundle = bundle(tmp_path / "b")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("shutil.copyfile", full)
    with pytest.raises(FgvcError, match="No space left"):
        write_model(model_bundle, tmp_path / "repository")
    assert list((tmp_path / "repository").iterdir()) == []


def test_the_verb_twice_gives_the_same_bytes_and_needs_no_torch(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle(tmp_path / "b")
    main_arguments = ["triton", str(tmp_path / "b"), "--name", "birds"]
    written = []
    for repository in (tmp_path / "one", tmp_path / "two"):
        with pytest.raises(SystemExit) as ended:
            main([*main_arguments, str(repository)])
        assert not ended.value.code
        assert capsys.readouterr().out == f"{repository / 'birds'}\n"
        written.append({p.relative_to(repository): p.read_bytes() for p in repository.rglob("*") if p.is_file()})
    assert written[0] == written[1]
    code = (
        "import sys\nfrom fgvc.cli.app import main\n"
        "try:\n    main(sys.argv[1:])\nexcept SystemExit as end:\n    assert not end.code\n"
        "assert not {'torch', 'onnx', 'timm', 'tritonclient'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code, *main_arguments, str(tmp_path / "three")], check=True)


class Server:
    """tritonclient's calls, answered by the network itself."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine

    def infer(self, model: str, inputs: list) -> Server:
        session = self.engine.session
        assert (model, inputs[0].name()) == ("colours", session.input)
        raw = inputs[0]._get_binary_data()
        assert inputs[0].datatype() == {"float32": "FP32", "uint8": "UINT8"}[session.file.dtype]
        self.x = np.frombuffer(raw, session.file.dtype).reshape(inputs[0].shape())
        return self

    def as_numpy(self, name: str) -> np.ndarray:
        assert name == self.engine.session.outputs[0]
        return self.engine.session.infer(self.x)[0]


def test_the_client_says_what_the_engine_says(tmp_path: Path) -> None:
    pytest.importorskip("geventhttpclient")
    client = script("triton/client.py")
    engine = Engine(bundle(tmp_path / "b"), threads=1)
    for name, colour in (("red", (255, 0, 0)), ("black", (0, 0, 0))):
        Image.new("RGB", (20, 10), colour).save(tmp_path / f"{name}.png")
    rows = [
        client.classify(Server(engine), "colours", engine.bundle, engine.session.file, tmp_path / name, top_k=1)
        for name in ("red.png", "black.png", "none.png")
    ]
    assert [row.get("rejected") for row in rows] == [False, True, None]  # by the threshold of 0.5, at temperature 2
    assert [row.get("calibrated") for row in rows] == [True, True, None]
    assert rows[0]["predictions"][0]["label"] == "red"
    assert rows[0]["predictions"][0]["probability"] == pytest.approx(np.e**5 / (np.e**5 + 2))
    assert rows[2]["error"] == "missing"


def test_the_client_feeds_a_file_of_another_program_as_it_is(tmp_path: Path) -> None:
    """Bytes, channels last; a softmax at the end is not taken twice."""
    pytest.importorskip("geventhttpclient")
    client = script("triton/client.py")
    raw = Preprocess(
        size=(SIZE, SIZE), resize="squash", crop_pct=1.0, input_range=255, mean=(0, 0, 0), std=(1, 1, 1)
    )
    files = {
        "model.onnx": small.bytes_in().SerializeToString(), "labels.json": list("abcde"), "preprocess.json": raw,
        "contract.json": {"num_classes": 5}, "metrics.json": {},
    }  # fmt: skip
    write_bundle(tmp_path / "b", files=files)
    engine = Engine(load_bundle(tmp_path / "b"), threads=1)
    Image.new("RGB", (20, 10), (200, 30, 90)).save(tmp_path / "red.png")
    row = client.classify(Server(engine), "colours", engine.bundle, file_of(engine.bundle), tmp_path / "red.png", top_k=5)
    (answer,) = engine.classify([Image.open(tmp_path / "red.png")], top_k=5)
    assert [each["label"] for each in row["predictions"]] == [each.label for each in answer.predictions]
    assert sum(each["probability"] for each in row["predictions"]) == pytest.approx(1)
