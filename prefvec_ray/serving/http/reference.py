"""`GET /docs`: the API's own description as a page, rendered here from the OpenAPI document.

FastAPI's page loads scripts from another host, which the policy of this endpoint's pages (`PAGE_HEADERS`) does not
allow. This one needs no script at all.
"""

from html import escape
from typing import Any

PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<link rel="icon" type="image/svg+xml" href="playground/icon.svg">
<link rel="stylesheet" href="playground/reference.css">
</head>
<body>
<h1>{title}</h1>
<p>{description}. The same for programs: <a href="openapi.json">openapi.json</a>.</p>
{routes}
{schemas}
</body>
</html>
"""


def render(document: dict[str, Any]) -> bytes:
    """The page of an OpenAPI document: its routes, and the fields of its schemas. All text in it is escaped."""
    info = document["info"]
    routes = [
        _route(method, path, operation)
        for path, operations in document["paths"].items()
        for method, operation in operations.items()
    ]
    schemas = [_schema(name, schema) for name, schema in document["components"]["schemas"].items()]
    return PAGE.format(
        title=escape(info["title"]),
        description=escape(info.get("description", "")),
        routes="\n".join(routes),
        schemas="\n".join(schemas),
    ).encode()


def _route(method: str, path: str, operation: dict[str, Any]) -> str:
    body = operation.get("requestBody", {}).get("content", {}).get("application/json", {}).get("schema")
    takes = f" takes {_type(body)}" if body else ""
    about = escape(operation.get("description") or operation.get("summary", ""))
    return f"<h2><code>{escape(method.upper())} {escape(path)}</code>{takes}</h2>\n<p>{about}</p>"


def _schema(name: str, schema: dict[str, Any]) -> str:
    required = set(schema.get("required", ()))
    rows = [
        f"<tr><td><code>{escape(field)}</code>{' (required)' if field in required else ''}</td>"
        f"<td>{_type(kind)}</td><td>{escape(kind.get('description', ''))}</td></tr>"
        for field, kind in schema.get("properties", {}).items()
    ]
    about = f"<p>{escape(schema['description'])}</p>" if "description" in schema else ""
    table = f"<table><tr><th>field</th><th>type</th><th></th></tr>{''.join(rows)}</table>" if rows else ""
    return f'<h2 id="{escape(name)}">{escape(name)}</h2>\n{about}{table}'


def _type(schema: dict[str, Any]) -> str:
    """A schema in a few words, as HTML."""
    if "$ref" in schema:
        name = escape(schema["$ref"].rpartition("/")[2])
        return f'<a href="#{name}">{name}</a>'
    if options := schema.get("anyOf") or schema.get("oneOf"):
        return " or ".join(_type(option) for option in options)
    if "const" in schema or "enum" in schema:
        return escape(" or ".join(repr(value) for value in schema.get("enum", [schema.get("const")])))
    kind = escape(str(schema.get("type", "any")))
    if kind == "array" and "items" in schema:
        kind = f"list of {_type(schema['items'])}"
    bounds = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
    bounds |= {"minItems": "items ≥", "maxItems": "items ≤", "maxLength": "characters ≤"}
    said = ", ".join(f"{word} {schema[key]}" for key, word in bounds.items() if key in schema)
    return f"{kind} ({escape(said)})" if said else kind
