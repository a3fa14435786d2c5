"""A bundle on Ray Serve: an image is the body of a POST, the answer is the JSON of /v1/classify, `?top_k=` classes of it.

    serve run app:build bundle=/models/birds     here
    serve deploy serve.yaml                      on a cluster, with what that file says

400 a wrong top_k, 405 no POST, 413 too large, 415 not of an accepted format, 422 broken or too many pixels, 503 too many wait
(with Retry-After).
"""

import asyncio
import re
from pathlib import Path

import numpy as np
import ray
from pydantic import BaseModel
from ray import serve
from starlette.requests import Request
from starlette.responses import JSONResponse

from fgvc.runtime.bundle import load_bundle
from fgvc.images.decode import decode
from fgvc.runtime.engine import Engine
from fgvc.config.images import MAX_PIXELS
from fgvc.errors import FgvcError, ImageError

FORMATS = ("JPEG", "PNG", "WEBP", "BMP")
MAX_BODY = 10 * 2**20  # bytes


class Settings(BaseModel):
    """What `serve run app:build` and `args` in serve.yaml may say."""

    bundle: str  # a folder that every node sees


@serve.deployment(
    num_replicas="auto",
    autoscaling_config={"min_replicas": 1, "max_replicas": 4, "target_ongoing_requests": 1.5},
    ray_actor_options={"num_cpus": 1},
    max_ongoing_requests=2,  # a replica decodes one while it computes the other
    max_queued_requests=32,  # of a proxy; unbounded, if it is not said
    backpressure_config={"retry_after_s": 1},
    health_check_period_s=10,
    health_check_timeout_s=10,
    graceful_shutdown_timeout_s=20,
)
class Classifier:
    def __init__(self, bundle: str) -> None:
        # Ray sets OMP_NUM_THREADS, which onnxruntime does not read: it would take all of the node's cores in every replica.
        cpus = ray.get_runtime_context().get_assigned_resources().get("CPU", 1)
        self.engine = Engine(load_bundle(Path(bundle)), threads=max(1, int(cpus)))
        self.name = Path(bundle).resolve().name

    def check_health(self) -> None:
        """Ray puts another replica in the place of one for which this raises."""
        if not np.isfinite(self.engine.logits(np.zeros((1, 3, *self.engine.bundle.preprocess.size), np.float32))).all():
            raise FgvcError("the network gives no numbers")

    async def __call__(self, request: Request) -> JSONResponse:
        top_k = request.query_params.get("top_k", "5")
        if request.method != "POST":
            return _refusal(405, "expected a POST with an image as its body")
        if not re.fullmatch("[1-9][0-9]{0,5}", top_k):
            return _refusal(400, "top_k: expected a whole number from 1")
        body = bytearray()
        async for piece in request.stream():
            body += piece
            if len(body) > MAX_BODY:
                return _refusal(413, f"more than {MAX_BODY} bytes")
        try:
            return JSONResponse(await asyncio.to_thread(self.classify, bytes(body), int(top_k)))
        except ImageError as error:
            return _refusal(415 if error.reason == "format not accepted" else 422, error.reason)
        except MemoryError:
            return _refusal(503, "out of memory")

    def classify(self, body: bytes, top_k: int) -> dict[str, object]:
        answer = self.engine.classify([decode(body, max_pixels=MAX_PIXELS, formats=FORMATS)], top_k=top_k)[0]
        rows = [{"label": p.label, "index": p.index, "probability": p.probability} for p in answer.predictions]
        return {
            "model": self.name, "predictions": rows, "rejected": answer.rejected, "calibrated": answer.calibrated
        }  # fmt: skip


def _refusal(status: int, reason: str) -> JSONResponse:
    return JSONResponse({"error": reason}, status)


def build(settings: Settings) -> serve.Application:
    return Classifier.bind(settings.bundle)
