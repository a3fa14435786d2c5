"""Score a folder of images, or a Parquet list of them, with a bundle on Ray Data: a row an image, in their order.

    python score.py BUNDLE images/ scores.parquet
    python score.py BUNDLE list.parquet scores.csv --root /data/images      # column `path`

Actors read the images where they run: only paths and answers travel, an actor holds one image at full size, and the list is
held as a column of strings. On several machines the bundle and the images are at the same place on all of them.
Columns: path, label, index, probability, rejected ("none of these"), error, calibrated (the probability); where there is an
error the others are empty.
Exit code 1 where an image could not be read, 2 for a mistake in the command.
"""

import argparse
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pyarrow as pa
import ray
from pyarrow import csv, parquet

from fgvc.io.files import replacing
from fgvc.runtime.bundle import load_bundle
from fgvc.images.decode import decode
from fgvc.images.preprocess import preprocess
from fgvc.runtime.engine import Engine
from fgvc.runtime.predict import expand
from fgvc.errors import FgvcError, ImageError

SCHEMA = pa.schema(
    {
        "path": pa.string(), "label": pa.string(), "index": pa.int32(), "probability": pa.float64(),
        "rejected": pa.bool_(), "error": pa.string(), "calibrated": pa.bool_(),
    }
)  # fmt: skip
BATCH = 16  # images a forward; on CPUs a larger one is no faster
BLOCK = 1024  # rows that go to an actor at once, and are written at once


class Scorer:
    def __init__(self, bundle: str, root: str) -> None:
        cpus = ray.get_runtime_context().get_assigned_resources().get("CPU", 1)
        self.engine = Engine(load_bundle(Path(bundle)), threads=max(1, int(cpus)))
        self.root = Path(root)

    def __call__(self, table: pa.Table) -> pa.Table:
        """Answers for the column `path`; what can't be read keeps its row."""
        read = [(path, self.read(path)) for path in table["path"].to_pylist()]
        good = [x for _, x in read if isinstance(x, np.ndarray)]
        said = iter(self.engine.answers(self.engine.logits(np.stack(good)), top_k=1) if good else [])
        rows = [row(path, x if isinstance(x, str) else next(said)) for path, x in read]
        return pa.Table.from_pylist(rows, SCHEMA)

    def read(self, path: str | None) -> np.ndarray | str:
        """(3,H,W) float32, or why there is none."""
        try:
            return preprocess(decode(self.root / path), self.engine.bundle.preprocess) if path else "no path"
        except ImageError as error:
            return error.reason


def row(path: str | None, said: object) -> dict[str, object]:
    if isinstance(said, str):
        return {"path": path, "error": said}
    best = said.predictions[0]
    return {
        "path": path, "label": best.label, "index": best.index, "probability": best.probability,
        "rejected": said.rejected, "calibrated": said.calibrated,
    }  # fmt: skip


def score(bundle: Path, source: Path, out: Path, *, root: Path, actors: int | None = None) -> int:
    """Write `out`, .parquet or .csv, whole or not at all; returns how many images could not be read.

    Raises FgvcError for what is not there and for a list without a column `path` of strings.
    """
    if out.suffix not in (".parquet", ".csv"):
        raise FgvcError(f"{out}: expected a name in .parquet or .csv")
    load_bundle(bundle)  # a damaged one is refused here, not by every actor
    context = ray.data.DataContext.get_current()
    context.execution_options.preserve_order = True
    context.enable_progress_bars = sys.stderr.isatty()
    most = actors or max(1, int(ray.cluster_resources().get("CPU", 1)))
    scored = ray.data.from_arrow(list(_paths(source))).map_batches(
        Scorer, batch_size=BATCH, batch_format="pyarrow", num_cpus=1,
        compute=ray.data.ActorPoolStrategy(min_size=1, max_size=most),
        fn_constructor_args=(str(bundle.resolve()), str(root.resolve())),
    )  # fmt: skip
    bad = 0
    with replacing(out) as scratch, _writer(scratch) as writer:
        for table in scored.iter_batches(batch_size=BLOCK, batch_format="pyarrow"):
            writer.write_table(table.cast(SCHEMA))
            bad += len(table) - table["error"].null_count
    return bad


def _paths(source: Path) -> Iterator[pa.Table]:
    """The column `path` in blocks. Not by Ray's readers: on one CPU they wait for the actor, and the actor for them."""
    if source.suffix != ".parquet":
        paths = [str(path.resolve()) for path in expand([source])]
        yield from _blocks(pa.table({"path": pa.array(paths, pa.string())}))
        return
    try:
        table = parquet.read_table(source, columns=["path"])
        yield from _blocks(table.cast(pa.schema({"path": pa.string()})))
    except (OSError, pa.ArrowException) as error:
        raise FgvcError(f"{source}: not a Parquet file with a column `path` of strings: {error}") from error


def _blocks(table: pa.Table) -> Iterator[pa.Table]:
    return (table.slice(start, BLOCK) for start in range(0, len(table), BLOCK))


@contextmanager
def _writer(path: Path) -> Iterator[csv.CSVWriter | parquet.ParquetWriter]:
    with (csv.CSVWriter if path.suffix == ".csv" else parquet.ParquetWriter)(path, SCHEMA) as writer:
        yield writer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("source", type=Path, help="a folder of images, or a .parquet file with a column `path`")
    parser.add_argument("out", type=Path, help="a .parquet or .csv file")
    parser.add_argument("--root", type=Path, default=Path(), help="what paths in the list are relative to")
    parser.add_argument("--actors", type=int, help="at most; default: one for each CPU of the cluster")
    options = parser.parse_args()
    ray.init(log_to_driver=False)
    try:
        bad = score(options.bundle, options.source, options.out, root=options.root, actors=options.actors)
    except FgvcError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    finally:
        ray.shutdown()
    print(options.out)
    if bad:
        print(f"warning: {bad} images could not be read; see the column `error`", file=sys.stderr)
    sys.exit(1 if bad else 0)


if __name__ == "__main__":
    main()
