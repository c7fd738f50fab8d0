"""The playground: a page at `/` from which the endpoint can be tried. Static files of this package, no build step.

The page asks for nothing but this endpoint's own routes, and its policy (`PAGE_HEADERS`) lets the browser load
nothing else: no inline script, no other host, no frame around it.
"""

import hashlib
from importlib.resources import files

from fastapi import APIRouter
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

PAGE_HEADERS = {
    "content-security-policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self';"
        " base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
    "cross-origin-opener-policy": "same-origin",
    # Kept by the browser, and asked about each time: a new deployment shows its own page at once.
    "cache-control": "no-cache",
}
TYPES = {"html": "text/html", "css": "text/css", "js": "text/javascript", "svg": "image/svg+xml"}


def _suffix(name: str) -> str:
    return name.rpartition(".")[2]


_PARTS = {
    part.name: part.read_bytes()
    for part in files("prefvec_ray.serving.http").joinpath("playground").iterdir()
    if _suffix(part.name) in TYPES
}

router = APIRouter(include_in_schema=False)


@router.api_route("/", methods=["GET", "HEAD"])
async def page(request: Request) -> Response:
    return _part(request, "index.html")


@router.api_route("/playground/{name}", methods=["GET", "HEAD"])
async def part(name: str, request: Request) -> Response:
    return _part(request, name)


def _part(request: Request, name: str) -> Response:
    """One file, or 304 where the browser has it. Names are looked up among those known, never on the disk."""
    if name not in _PARTS:
        raise HTTPException(404)
    content = _PARTS[name]
    headers = PAGE_HEADERS | {"etag": f'"{hashlib.sha256(content).hexdigest()[:32]}"'}
    if request.headers.get("if-none-match") == headers["etag"]:
        return Response(status_code=304, headers=headers)
    return Response(content, headers=headers, media_type=f"{TYPES[_suffix(name)]}; charset=utf-8")
