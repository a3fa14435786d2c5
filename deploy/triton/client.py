"""Classify images on a Triton server, on KServe, or on `fgvc serve`: they take and give tensors, so preprocessing, temperature,
threshold and names are the client's part, and come from the bundle that the server's model was made of.

    python client.py BUNDLE IMAGE... --url 127.0.0.1:8000 --model birds

Needs the extra `triton`. One JSON object a line, as `fgvc predict --json` writes it; exit code 1 where an image could not be
read.
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np
from tritonclient.http import InferenceServerClient, InferInput
from tritonclient.utils import InferenceServerException, np_to_triton_dtype

from fgvc.runtime.bundle import Bundle, load_bundle
from fgvc.images.preprocess import preprocess
from fgvc.runtime.description import Description
from fgvc.runtime.engine import answers, as_logits, feed, file_of
from fgvc.runtime.predict import decoded, expand
from fgvc.errors import FgvcError, ImageError


def logits(client: InferenceServerClient, model: str, file: Description, x: np.ndarray) -> np.ndarray:
    """(B,K) float32 for x (B,3,H,W) float32, fed as the file takes it; what it ends with is undone."""
    fed = feed(x, file)
    tensor = InferInput(file.input, list(fed.shape), np_to_triton_dtype(fed.dtype))
    tensor.set_data_from_numpy(fed, binary_data=True)
    return as_logits(client.infer(model, [tensor]).as_numpy(file.output), file.ending)


def classify(
    client: InferenceServerClient, model: str, bundle: Bundle, file: Description, path: Path, *, top_k: int
) -> dict[str, object]:
    image = decoded(path)
    if isinstance(image, ImageError):
        return {"path": str(path), "error": image.reason}
    z = logits(client, model, file, preprocess(image, bundle.preprocess)[None])
    answer = answers(bundle, z, ending=file.ending, top_k=top_k)[0]
    rows = [{"label": p.label, "index": p.index, "probability": p.probability} for p in answer.predictions]
    return {"path": str(path), "rejected": answer.rejected, "calibrated": answer.calibrated, "predictions": rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("images", type=Path, nargs="+", help="images, or folders of images")
    parser.add_argument("--url", default="127.0.0.1:8000", help="host:port, without http://")
    parser.add_argument("--model", required=True, help="its name on the server")
    parser.add_argument("--top-k", type=int, default=1)
    options = parser.parse_args()
    failed = False
    try:
        bundle = load_bundle(options.bundle)
        file = file_of(bundle)
        with InferenceServerClient(options.url) as client:
            for path in expand(options.images):
                row = classify(client, options.model, bundle, file, path, top_k=options.top_k)
                failed |= "error" in row
                print(json.dumps(row, ensure_ascii=False, allow_nan=False))
    except (FgvcError, InferenceServerException, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
