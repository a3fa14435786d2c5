"""The server's routes: the Open Inference Protocol v2 for tensors, `/v1` for images, health and metrics.

Heavy work is done in Admission's threads, images and large JSON included: the event loop only moves bytes.
"""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from functools import partial
from io import BytesIO
from typing import Annotated, Any, TypeVar
from urllib.parse import parse_qsl, quote

from fastapi import APIRouter, FastAPI, Query, Request
from fastapi.responses import JSONResponse, Response
from fastapi.routing import APIRoute
from PIL import Image
from pydantic import BaseModel
from starlette.datastructures import UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.types import ASGIApp, Receive, Scope, Send

from fgvc.errors import ImageError
from fgvc.images.decode import RAISE_LIMIT, decode
from fgvc.images.overlay import overlay
from fgvc.images.preprocess import fit
from fgvc.runtime.explain import PREDICTED, explain_crops
from fgvc.serving import protocol
from fgvc.serving.admission import Admission
from fgvc.serving.api_key import ApiKeyMiddleware
from fgvc.serving.bodies import BodyBudget
from fgvc.serving.examples import Example
from fgvc.serving.handlers import HANDLERS, broken
from fgvc.serving.limits import FORMATS, Limits, Refusal
from fgvc.serving.metrics import CONTENT_TYPE, Metrics, MetricsMiddleware
from fgvc.serving.middleware import LingerMiddleware, LoadSheddingMiddleware
from fgvc.serving.models import VERSION, LoadedModel, ModelRegistry
from fgvc.serving.page import CSP, PAGE

T = TypeVar("T")

PAGE_HEADERS = {"Content-Security-Policy": CSP, "X-Content-Type-Options": "nosniff", "Cache-Control": "no-cache"}


class Service:
    """State that the routes share."""

    def __init__(
        self, models: ModelRegistry, admission: Admission, limits: Limits, *, examples: Sequence[Example] = ()
    ) -> None:
        self.models, self.admission, self.limits, self.examples = models, admission, limits, examples
        self.bodies = BodyBudget(limits)
        self.metrics = Metrics(models, admission)

    async def compute(self, request: Request, limit: int, work: Callable[[bytes], T]) -> T:
        """Read the request's body, then run `work` on it in a thread. Raises Refusal and ClientGone."""
        deadline = asyncio.get_running_loop().time() + self.limits.seconds
        async with self._admitted_body(request, limit, deadline) as body:
            return await self.admission.run(partial(_with_memory_errors, work, body), request, deadline=deadline)

    @asynccontextmanager
    async def _admitted_body(self, request: Request, limit: int, deadline: float) -> AsyncIterator[bytes]:
        """Body of a request that counts as in flight, and its bytes as held, until the block ends."""
        with self.admission.arrival():
            async with self.bodies.body(request, limit=limit, deadline=deadline) as body:
                yield body


def _service(request: Request) -> Service:
    """Service of the application. Not by FastAPI's Depends: solving dependencies costs more than all else that the event
    loop does for a request."""
    return request.app.state.service


def _with_memory_errors(work: Callable[[bytes], T], body: bytes) -> T:
    """Run `work` with a MemoryError for what onnxruntime could not allocate: it has no error of its own for that."""
    try:
        return work(body)
    except Exception as error:
        if type(error).__module__.startswith("onnxruntime") and "alloc" in str(error).lower():
            raise MemoryError(str(error)) from error
        raise


ModelName = Annotated[str | None, Query(description="Default: the first of the command line.")]
router = APIRouter()


def make_app(service: Service, *, key: str | None = None) -> ASGIApp:
    """The whole server as an ASGI application. `key`: that clients must send, see `api_key`."""
    app = FastAPI(
        title="fgvc",
        version=protocol.server_metadata()["version"],
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
    )  # FastAPI's pages of documentation fetch their scripts from a CDN: there is /openapi.json alone
    app.state.service = service
    app.include_router(router)
    for kind, handle in HANDLERS:
        app.add_exception_handler(kind, handle)
    direct = FastPathMiddleware(app)
    inner = MetricsMiddleware(direct if key is None else ApiKeyMiddleware(direct, key), service.metrics)
    return LingerMiddleware(LoadSheddingMiddleware(inner, service.admission, service.metrics))


class FastPathMiddleware:
    """Middleware that calls the routes of the two main requests directly, past FastAPI's general processing, which costs a
    twentieth of a small network's time. Unusual forms of them, and all other requests, go the usual way."""

    _INFER = re.compile(r"/v2/models/([^/]+)(?:/versions/([^/]+))?/infer")

    def __init__(self, app: ASGIApp) -> None:
        self._app = app
        self._routes = {route.name: route for route in router.routes if isinstance(route, APIRoute)}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        match = self._match(scope) if scope["type"] == "http" and scope["method"] == "POST" else None
        if match is None:
            return await self._app(scope, receive, send)
        route, endpoint, options = match
        scope["app"], scope["route"] = self._app, route
        request = Request(scope, receive)
        try:
            response = await endpoint(request, **options)
        except Exception as error:
            handle = next(handle for kind, handle in HANDLERS if isinstance(error, kind))
            await (await handle(request, error))(scope, receive, send)
            if handle is broken:
                raise
        else:
            await response(scope, receive, send)

    def _match(self, scope: Scope) -> tuple[APIRoute, Callable[..., Awaitable[Response]], dict[str, Any]] | None:
        """Route, function and arguments of a main request, or None."""
        if scope["path"] == "/v1/classify":
            query = dict(parse_qsl(scope["query_string"].decode("latin-1"), keep_blank_values=True))
            top_k = query.pop("top_k", "5")
            if query.keys() <= {"model"} and top_k.isdecimal() and len(top_k) < 6 and int(top_k):
                return self._routes["classify"], classify, {"model": query.get("model"), "top_k": int(top_k)}
        elif path := self._INFER.fullmatch(scope["path"]):
            return self._routes["infer"], infer, {"model": path[1], "version": path[2] or VERSION}
        return None


@router.get("/", include_in_schema=False)
async def page() -> Response:
    """Page to classify a picture and show its heat map."""
    return Response(PAGE, media_type="text/html", headers=PAGE_HEADERS)


# Health and metrics


@router.head("/v2/health/live", include_in_schema=False)  # some monitors send HEAD
@router.get("/v2/health/live")
async def live() -> Response:
    """200 as long as the process answers, also while it shuts down."""
    return Response()


@router.head("/v2/health/ready", include_in_schema=False)
@router.get("/v2/health/ready")
async def ready(request: Request) -> Response:
    """503 from the moment that the process was asked to stop."""
    return Response(status_code=503 if _service(request).admission.draining else 200)


@router.get("/metrics")
async def metrics(request: Request) -> Response:
    """Metrics for Prometheus."""
    return Response(_service(request).metrics.text(), media_type=CONTENT_TYPE)


# Tensors


@router.get("/v2")
async def server_metadata() -> Response:
    return JSONResponse(protocol.server_metadata())


@router.get("/v2/models")
async def list_models(request: Request) -> Response:
    """List the models: name, versions, how many classes, whether /v1/explain has its heat map."""
    rows = [
        {
            "name": served.name,
            "versions": [VERSION],
            "classes": len(served.labels),
            "explain": served.explainer is not None,
        }
        for served in _service(request).models
    ]
    return JSONResponse({"models": rows})


@router.get("/v1/examples")
async def list_examples(request: Request) -> Response:
    """Name the example pictures, in the order of their numbers from 0."""
    return JSONResponse({"examples": [example.name for example in _service(request).examples]})


@router.get("/v1/examples/{number}", response_class=Response)
async def example(request: Request, number: int) -> Response:
    """An example picture, a JPEG."""
    examples = _service(request).examples
    if not 0 <= number < len(examples):
        raise Refusal(404, f"there are {len(examples)} examples, numbered from 0")
    return Response(examples[number].jpeg, media_type="image/jpeg")


@router.post("/v2/repository/index")
async def repository_index(request: Request) -> Response:
    """List the models in Triton's form. Nothing is ever loaded over HTTP."""
    rows = [{"name": served.name, "version": VERSION, "state": "READY", "reason": ""} for served in _service(request).models]
    return JSONResponse(rows)


@router.get("/v2/models/{model}")
@router.get("/v2/models/{model}/versions/{version}", name="version_metadata")
async def model_metadata(request: Request, model: str, version: str = VERSION) -> Response:
    return JSONResponse(protocol.model_metadata(_find(_service(request), model, version)))


@router.get("/v2/models/{model}/ready")
@router.get("/v2/models/{model}/versions/{version}/ready", name="version_ready")
async def model_ready(request: Request, model: str, version: str = VERSION) -> Response:
    _find(_service(request), model, version)
    return Response(status_code=503 if _service(request).admission.draining else 200)


@router.post("/v2/models/{model}/infer")
@router.post("/v2/models/{model}/versions/{version}/infer", name="version_infer")
async def infer(request: Request, model: str, version: str = VERSION) -> Response:
    """Tensors as the file takes them in, what it gives out, as JSON or bytes."""
    service = _service(request)
    served, limits = _find(service, model, version), service.limits

    def work(body: bytes) -> tuple[bytes, int | None]:
        return protocol.infer(served, body, request.headers, batch=limits.batch, limit=limits.tensor_bytes)

    content, length = await service.compute(request, limits.tensor_bytes, work)
    if length is None:
        return Response(content, media_type="application/json")
    return Response(content, media_type="application/octet-stream", headers={protocol.HEADER_LENGTH: str(length)})


def _find(service: Service, model: str, version: str) -> LoadedModel:
    if version != VERSION:
        raise Refusal(404, f"model {model!r} has version {VERSION} only")
    return service.models.get(model)


# Images


class Predicted(BaseModel):
    label: str
    index: int
    probability: float


class Classified(BaseModel):
    model: str
    predictions: list[Predicted]
    rejected: bool
    calibrated: bool
    milliseconds: dict[str, float]


_BODY: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "description": f"{', '.join(FORMATS)}; as it is, or as the only file of a form",
        "content": {
            "image/*": {"schema": {"type": "string", "format": "binary"}},
            "multipart/form-data": {
                "schema": {"type": "object", "properties": {"image": {"type": "string", "format": "binary"}}}
            },
        },
    }
}


@router.post("/v1/classify", openapi_extra=_BODY, responses={200: {"model": Classified}})
async def classify(
    request: Request,
    model: ModelName = None,
    top_k: Annotated[int, Query(ge=1, description="How many classes to name.")] = 5,
) -> Response:
    """Most probable classes, by the bundle's temperature; `rejected`: none of these, by its threshold; `calibrated`: whether
    that temperature was fitted."""
    service, arrived = _service(request), time.perf_counter()
    served = service.models.get(model)
    form = _is_form(request)

    def work(body: bytes) -> dict[str, Any]:
        begun = time.perf_counter()
        image = _decode(_only_file(request, body) if form else body, service.limits)
        decoded = time.perf_counter()
        (answer,) = served.engine.classify([image], top_k=min(top_k, len(served.labels)))
        done = time.perf_counter()
        spent = {
            "wait": begun - arrived,
            "decode": decoded - begun,
            "classify": done - decoded,
            "total": done - arrived,
        }
        return {
            "model": served.name,
            "predictions": [
                {"label": p.label, "index": p.index, "probability": p.probability} for p in answer.predictions
            ],
            "rejected": answer.rejected,
            "calibrated": answer.calibrated,
            "milliseconds": {name: round(1000 * seconds, 3) for name, seconds in spent.items()},
        }

    return JSONResponse(await service.compute(request, service.limits.image_bytes, work))


@router.post(
    "/v1/explain", openapi_extra=_BODY, response_class=Response, responses={200: {"content": {"image/png": {}}}}
)
async def explain(
    request: Request,
    model: ModelName = None,
    target: Annotated[str, Query(description="A class by name; default: the most probable one.")] = PREDICTED,
) -> Response:
    """Heat map: the class activation map over the picture as the network sees it, PNG; with the header
    `X-Map: empty` where it is 0 everywhere."""
    service = _service(request)
    served = service.models.get(model)
    form, explainer = _is_form(request), served.explainer
    if explainer is None:
        raise Refusal(409, f"model {served.name!r} has no explain.onnx in its bundle")
    if target != PREDICTED and target not in served.labels:
        raise Refusal(400, f"model {served.name!r} has no class {target!r}")
    label = None if target == PREDICTED else served.labels.index(target)

    def work(body: bytes) -> tuple[bytes, int, bool]:
        image = _decode(_only_file(request, body) if form else body, service.limits)
        crop = fit(image, explainer.spec)
        (explanation,) = explain_crops(explainer, [crop], label)
        content = BytesIO()
        overlay(Image.fromarray(crop), explanation.maps["cam"]).save(content, "PNG", compress_level=1)
        return content.getvalue(), explanation.label, not explanation.maps["cam"].any()

    png, shown, empty = await service.compute(request, service.limits.image_bytes, work)
    headers = {"X-Target-Index": str(shown), "X-Target-Label": quote(served.labels[shown])}
    headers |= {"X-Map": "empty"} if empty else {}
    return Response(png, media_type="image/png", headers=headers)


def _is_form(request: Request) -> bool:
    """Whether the body is a form; else it is the picture, whatever its Content-Type: its first bytes decide."""
    return request.headers.get("content-type", "").lower().startswith("multipart/form-data")


def _only_file(request: Request, body: bytes) -> bytes:
    """File of a form that holds one. Raises Refusal (400)."""

    async def stream() -> AsyncIterator[bytes]:
        yield body

    parser = MultiPartParser(request.headers, stream(), max_files=1, max_fields=10)  # type: ignore[arg-type]
    parser.spool_max_size = len(body) + 1  # never a temporary file
    try:
        form = asyncio.run(parser.parse())
    except (MultiPartException, KeyError, ValueError) as error:
        raise Refusal(400, f"the form can't be read: {error}") from None
    files = [value for _, value in form.multi_items() if isinstance(value, UploadFile)]
    if len(files) != 1:
        raise Refusal(400, "expected a form with one file, the picture")
    with files[0].file as file:
        return file.read()


def _decode(content: bytes, limits: Limits) -> Image.Image:
    try:
        return decode(content, max_pixels=limits.pixels, formats=FORMATS)
    except ImageError as error:
        if error.reason == "format not accepted":
            raise Refusal(415, f"the picture is none of {', '.join(FORMATS)}") from None
        raise Refusal(422, f"the picture can't be used: {error.reason.removesuffix(RAISE_LIMIT)}") from None
