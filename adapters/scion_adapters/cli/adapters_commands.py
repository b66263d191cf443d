"""`scion adapters`: what versions there are, how they differ, and moving them in and out."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from scion_adapters.cli.output import (
    JsonOption,
    ReasonOption,
    actor,
    console,
    format_bytes,
    format_time,
    print_json,
    print_table,
)

if TYPE_CHECKING:
    from scion_adapters.records import Version
    from scion_adapters.registry import Registry

RefArgument = Annotated[str, typer.Argument(metavar="VERSION", help="Such as chat:7, chat@champion or chat.")]
NameArgument = Annotated[str, typer.Argument(metavar="NAME", help="The adapter.")]


def register(app: typer.Typer) -> None:
    """Add `adapters` to `scion`."""
    group = typer.Typer(name="adapters", help="Adapters and their versions.", no_args_is_help=True)
    group.command("list")(list_adapters)
    group.command("show")(show)
    group.command("diff")(diff)
    group.command("import")(import_adapter)
    group.command("export")(export)
    group.command("alias")(alias)
    group.command("retire")(retire_version)
    group.command("gc")(collect_garbage)
    app.add_typer(group)


def list_adapters(as_json: JsonOption = False) -> None:
    """List the adapters with what they serve."""
    from scion_adapters.listing import adapters_json

    found = adapters_json(_registry())
    if as_json:
        print_json(found)
        return
    rows = [(item["adapter"], item["num_versions"], _aliases_text(item["aliases"])) for item in found]
    print_table(("adapter", "versions", "aliases"), rows)


def show(
    what: Annotated[str, typer.Argument(metavar="NAME|VERSION", help="An adapter, or a version such as chat:7.")],
    as_json: JsonOption = False,
) -> None:
    """Show an adapter's versions and aliases, or all that is known of one version."""
    from scion_adapters.listing import adapter_json

    registry = _registry()
    if ":" in what or "@" in what:
        _show_version(registry.version(registry.resolve(what)), registry, as_json)
        return
    if as_json:
        print_json(adapter_json(registry, what))
        return
    versions, aliases, history = registry.versions(what), registry.aliases(what), registry.alias_history(what)
    print_table(
        ("version", "state", "parent", "recipe", "published", "by", "aliases"),
        [
            (
                version.ref,
                version.state,
                version.parent or "base",
                version.recipe,
                format_time(version.created_at),
                version.created_by,
                ", ".join(name for name, number in aliases.items() if number == version.number) or None,
            )
            for version in versions
        ],
    )
    rows = [
        (format_time(change.at), change.alias, change.previous, change.number, change.actor, change.reason)
        for change in history
    ]
    if rows:
        print_table(("time", "alias", "from", "to", "by", "why"), rows, title="Aliases")


def diff(first: RefArgument, second: RefArgument, as_json: JsonOption = False) -> None:
    """Compare two versions: how they were made, and how far apart their weights are in each module."""
    from scion_adapters.difference import compare_adapters, total

    registry = _registry()
    refs = (registry.resolve(first), registry.resolve(second))
    versions = [registry.version(ref) if ref.number else None for ref in refs]
    paths = [registry.store.path(version.digest) if version else None for version in versions]
    modules = compare_adapters(paths[0], paths[1])
    everything = total(modules)
    known = [
        _public(version) if version else {"version": str(ref)} for version, ref in zip(versions, refs, strict=True)
    ]
    metadata = {key: [item.get(key) for item in known] for key in dict.fromkeys([*known[0], *known[1]])}
    if as_json:
        shown = [{**dataclasses.asdict(item), "relative": item.relative} for item in (*modules, everything)]
        print_json({"first": str(refs[0]), "second": str(refs[1]), "metadata": metadata, "modules": shown})
        return
    differing = [(key, *values) for key, values in metadata.items() if values[0] != values[1] and key != "version"]
    print_table(("", str(refs[0]), str(refs[1])), differing)
    rows = [
        (
            item.module,
            f"{item.norm_first:.4g}",
            f"{item.norm_second:.4g}",
            f"{item.norm_difference:.4g}",
            None if item.relative is None else f"{item.relative:.1%}",
        )
        for item in (*modules, everything)
    ]
    print_table(("module", f"norm {refs[0]}", f"norm {refs[1]}", "norm of difference", "relative"), rows)


def import_adapter(
    directory: Annotated[Path, typer.Argument(help="A PEFT adapter directory.")],
    name: NameArgument,
    reason: ReasonOption = "imported",
    digest: Annotated[str | None, typer.Option(help="The digest that it must have: what `show` names it by.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Check a PEFT directory and publish it as a candidate; its parent is the champion."""
    from scion_adapters.fingerprint import base_info
    from scion_adapters.registry import limits_of, open_registry
    from scion_adapters.settings import load_settings

    settings = load_settings()
    registry = open_registry(settings)
    version = registry.publish(
        name,
        directory.expanduser().resolve(),
        parent=registry.resolve(name).number if name in registry.adapters() else 0,
        base=base_info(settings),
        limits=limits_of(settings),
        actor=actor(),
        reason=reason,
        recipe="import",
        digest=digest,
    )
    if as_json:
        print_json(_public(version))
        return
    console.print(f"Published {version.ref} as a candidate ({format_bytes(version.size_bytes)}, rank {version.rank}).")
    console.print(f"`scion evaluate {version.ref}` takes it through the gates.")


def export(
    version: RefArgument,
    directory: Annotated[Path, typer.Argument(help="A folder that does not exist yet.")],
    as_json: JsonOption = False,
) -> None:
    """Copy a version's files out, as a PEFT adapter directory."""
    from scion_adapters.adapter_files import MANIFEST_FILE
    from scion_adapters.errors import ConflictError, NotFoundError

    registry = _registry()
    ref = registry.resolve(version)
    if ref.number == 0:
        raise NotFoundError(f"{version} is the base itself: there are no adapter files to export")
    target = directory.expanduser().resolve()
    if target.exists():
        raise ConflictError(f"{target} exists already: name a folder that does not")
    digest = registry.version(ref).digest
    registry.store.verify(digest)
    shutil.copytree(registry.store.path(digest), target, ignore=shutil.ignore_patterns(MANIFEST_FILE))
    if as_json:
        print_json({"version": str(ref), "directory": str(target), "digest": digest})
    else:
        console.print(f"Copied {ref} to {target}.", soft_wrap=True)


def alias(
    name: NameArgument,
    alias_name: Annotated[str, typer.Argument(metavar="ALIAS", help="The movable name, asked for as NAME@ALIAS.")],
    number: Annotated[int | None, typer.Argument(min=0, help="The accepted version; 0 is the base.")] = None,
    remove: Annotated[bool, typer.Option("--remove", help="Remove the alias.")] = False,
    reason: ReasonOption = "",
    as_json: JsonOption = False,
) -> None:
    """Point an alias of your own at an accepted version, or remove it."""
    from scion_adapters.errors import InvalidInputError

    if (number is None) is not remove:
        raise InvalidInputError("give either the number of a version or --remove", field="number")
    registry = _registry()
    if number is None:
        registry.remove_alias(name, alias_name, actor=actor(), reason=reason)
    else:
        registry.set_alias(name, alias_name, number, actor=actor(), reason=reason)
    if as_json:
        print_json({"adapter": name, "aliases": registry.aliases(name)})
    else:
        console.print(f"{name}: {_aliases_text(registry.aliases(name)) or 'no aliases'}")


def retire_version(version: RefArgument, reason: ReasonOption = "", as_json: JsonOption = False) -> None:
    """Take a version out of service for good: servers drop it, and `gc` may delete its files."""
    from scion_adapters.retirement import retire

    registry = _registry()
    retired = retire(registry.database, registry.resolve(version), actor=actor(), reason=reason)
    if as_json:
        print_json(_public(retired))
    else:
        console.print(f"{retired.ref} is retired; `scion adapters gc` deletes its files once no server holds it.")


def collect_garbage(
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would be deleted.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Delete the files of retired and rejected versions that nothing can reach any more."""
    from scion_adapters.gc import collect
    from scion_adapters.settings import load_settings

    window_s = load_settings().rollout.rollback_window_s
    fates = collect(_registry(), rollback_window_s=window_s, dry_run=dry_run, actor=actor())
    if as_json:
        print_json([{"version": str(f.version.ref), "digest": f.version.digest, "kept_for": f.kept_for} for f in fates])
        return
    rows = [(f.version.ref, format_bytes(f.version.size_bytes), f.kept_for or _gone(dry_run)) for f in fates]
    print_table(("version", "size", "files"), rows)


def _gone(dry_run: bool) -> str:
    return "would be deleted" if dry_run else "deleted"


def _registry() -> Registry:
    from scion_adapters.registry import open_registry
    from scion_adapters.settings import load_settings

    return open_registry(load_settings())


def _show_version(version: Version, registry: Registry, as_json: bool) -> None:
    from scion_adapters.listing import version_json

    data = version_json(registry, version)
    if as_json:
        print_json(data)
        return
    data["created_at"] = format_time(version.created_at)
    data["size_bytes"] = format_bytes(version.size_bytes)
    data["aliases"] = ", ".join(data["aliases"]) or None
    data["report"] = ", ".join(data["report"]) or None
    metrics = data.pop("metrics")
    print_table(("", str(version.ref)), [*data.items(), *((f"metrics.{key}", value) for key, value in metrics.items())])


def _public(version: Version) -> dict[str, Any]:
    from scion_adapters.listing import public_json

    return public_json(version)


def _aliases_text(aliases: dict[str, int]) -> str | None:
    return ", ".join(f"{name}={number or 'base'}" for name, number in aliases.items()) or None
