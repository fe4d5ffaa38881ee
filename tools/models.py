"""`graphwright models`: real models to work with, and a look into any ONNX file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
from graphwright.passes.errors import UsageError

from .shell import (
    Group,
    as_bytes,
    as_shape,
    count_of,
    format_options,
    print_json,
    print_table,
    progress,
    verbosity_options,
)


def list_models() -> list[dict[str, Any]]:
    """Every model of the table: what it is, its sizes, if its files are fetched, and if `generate` takes it."""
    from graphwright.models import assets, generators, registry

    rows = []
    for name in registry.names():
        entry = registry.describe(name)
        wanted = dict.fromkeys(entry.needs_assets + entry.sample_assets)
        rows.append(
            {
                "name": name,
                "description": entry.description,
                "licence": entry.licence,
                "source": entry.source,
                "inputs": {key: list(shape) for key, shape in entry.inputs.items()},
                "sizes": dict(entry.sizes),
                "options": {key: str(value) for key, value in entry.options.items()},
                "fetched": all(assets.has(asset) for asset in wanted),
                "generates": name in generators.NAMED,
            }
        )
    return [*rows, *(_generator_row(name) for name in generators.NAMED if name not in registry.names())]


def _generator_row(name: str) -> dict[str, Any]:
    """A model that only `graphwright export` and `generate` take."""
    from graphwright.models import assets, generators

    entry = generators.NAMED[name]
    return {
        "name": name, "description": entry.description, "licence": entry.licence, "source": entry.source, "inputs": {},
        "sizes": {}, "options": {}, "fetched": entry.asset is None or assets.has(entry.asset), "generates": True,
    }  # fmt: skip


def inspect_model(path: Path) -> dict[str, Any]:
    """Inputs, outputs, operators, opsets, functions and sizes of an ONNX file. Raises ModelError."""
    from graphwright.passes import io

    from .summary import disk_bytes, histogram, weight_files

    model = io.load(path)
    operators = histogram(model)
    return {
        "model": str(path),
        "producer": " ".join(filter(None, (model.producer_name, model.producer_version))),
        "ir_version": model.ir_version,
        "opsets": {domain or "ai.onnx": version for domain, version in model.opset_imports.items()},
        "inputs": [_value(value) for value in model.graph.inputs if not value.is_initializer()],
        "outputs": [_value(value) for value in model.graph.outputs],
        "nodes": sum(operators.values()),
        "operators": operators,
        "functions": [f"{domain}::{name}" for domain, name, _ in model.functions],
        "weights_bytes": io.weights_nbytes(model),
        "file_bytes": disk_bytes(path, model),
        "external_files": [file.name for file in weight_files(model) if file != path.resolve()],
    }


def _value(value: Any) -> dict[str, Any]:
    shape = None
    if value.shape is not None:
        shape = [dim if isinstance(dim, int) else dim.value for dim in value.shape]
    return {"name": value.name, "type": str(value.type).lower(), "shape": shape}


def fetch_models(name: str) -> list[Path]:
    """Put what a model (or all of them) needs into the cache. Raises AssetError."""
    from graphwright.models import generators, registry

    if name not in registry.names() and (named := generators.NAMED.get(name)):
        return [] if named.asset is None else registry.fetch(named.asset)
    names = registry.names() if name == "all" else [name]
    with progress() as say:
        files: list[Path] = []
        for one in names:
            say(f"fetch {one}")
            files += registry.fetch(one)
    return list(dict.fromkeys(files))


def parse_options(texts: tuple[str, ...]) -> dict[str, Any]:
    """`["length=64"]` -> `{"length": 64}`; true, false and numbers are read as such. Raises UsageError."""
    options: dict[str, Any] = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if not equals or not key:
            raise UsageError(f"--set {text!r}: expected KEY=VALUE")
        words: dict[str, Any] = {"true": True, "false": False, "none": None}
        options[key.replace("-", "_")] = words[value] if value in words else _number(value)
    return options


def _number(text: str) -> int | float | str:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


@click.group(cls=Group, name="models", invoke_without_command=True)
@click.pass_context
def command(ctx: click.Context) -> None:
    """List, fetch, export and inspect models."""
    if ctx.invoked_subcommand is None:
        ctx.invoke(list_command)


@command.command("list")
@format_options
@verbosity_options
def list_command(as_json: bool) -> None:
    """List the models that can be fetched and exported."""
    rows = list_models()
    if as_json:
        print_json(rows)
        return
    print_table(
        ("model", "fetched", "inputs", "options", "what it is"),
        [
            (r["name"], "yes" if r["fetched"] else "", _inputs(r["inputs"], r["sizes"]),
             " ".join(f"{k}={v}" for k, v in r["options"].items()), r["description"])
            for r in rows
        ],
    )  # fmt: skip


def _inputs(inputs: dict[str, list[Any]], sizes: dict[str, int]) -> str:
    words = {word: f"{word}={size}" for word, size in sizes.items()}
    return ", ".join(f"{name} {as_shape([words.get(d, d) for d in shape])}" for name, shape in inputs.items())


@command.command("fetch")
@click.argument("name", metavar="NAME|all")
@verbosity_options
def fetch_command(name: str) -> None:
    """Put a model's weights and sample inputs into the cache, checked by their sha256."""
    files = fetch_models(name)
    if not files:
        click.echo(f"{name} comes along; there is nothing to fetch", err=True)
    for path in files:
        click.echo(path)


@command.command("export")
@click.argument("name")
@click.option("-o", "--output", required=True, metavar="FILE.onnx", help="Where to write it.")
@click.option("--set", "options", multiple=True, metavar="KEY=VALUE", help="An option of the model. May be repeated.")
@click.option("--overwrite", is_flag=True, help="Replace an output that exists.")
@verbosity_options
def export_command(name: str, output: str, options: tuple[str, ...], overwrite: bool) -> None:
    """Write a model as an ONNX file."""
    from graphwright.models import generators, registry

    if name in generators.NAMED and name not in registry.names():
        raise UsageError(f"{name} is a generator of text, not one file; run `graphwright export {name} -o DIR`")

    with progress() as say:
        say(f"export {name}")
        path = registry.export(name, output, overwrite=overwrite, **parse_options(options))
    click.echo(path)


@command.command("info")
@click.argument("path", metavar="FILE.onnx")
@format_options
@verbosity_options
def info_command(path: str, as_json: bool) -> None:
    """Inputs, outputs, operators, opset, functions and size of an ONNX file."""
    data = inspect_model(Path(path))
    if as_json:
        print_json(data)
        return
    opsets = ", ".join(f"{domain} {version}" for domain, version in data["opsets"].items())
    click.echo(f"{path}: {count_of(data['nodes'], 'node')}, {as_bytes(data['file_bytes'])} on disk, "
               f"{as_bytes(data['weights_bytes'])} of weights")  # fmt: skip
    click.echo(f"opset {opsets}; IR version {data['ir_version']}; made by {data['producer'] or 'unknown'}")
    if data["functions"]:
        click.echo(f"functions: {', '.join(data['functions'])}")
    if data["external_files"]:
        click.echo(f"external data: {', '.join(data['external_files'])}")
    click.echo()
    rows = [
        (kind[:-1], v["name"], v["type"], as_shape(v["shape"])) for kind in ("inputs", "outputs") for v in data[kind]
    ]
    print_table(("", "name", "type", "shape"), rows)
    click.echo()
    print_table(("operator", "nodes"), list(data["operators"].items()), right=("nodes",))
