"""The playground at ``/``: the files of ``page/``, with a policy that limits them to requests to this server."""

from pathlib import Path

from fastapi import APIRouter, HTTPException
from fastapi.responses import FileResponse

PAGE = Path(__file__).parents[1] / "page"

HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src "
    "'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}
MEDIA_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
"""Not from the system's tables, which differ in the type of .js."""

router = APIRouter(include_in_schema=False)


def _file(name: str) -> FileResponse:
    file = PAGE / name
    return FileResponse(file, media_type=MEDIA_TYPES[file.suffix], headers=HEADERS)


@router.api_route("/", methods=["GET", "HEAD"])
def page() -> FileResponse:
    return _file("index.html")


@router.api_route("/static/playground/{name}", methods=["GET", "HEAD"])
def asset(name: str) -> FileResponse:
    if name not in {file.name for file in PAGE.iterdir() if file.suffix in MEDIA_TYPES}:
        raise HTTPException(404, f"the playground has no file {name}")
    return _file(name)
