"""`fastload compile`: compile the kernels before any job runs, for images and for machines without a wheel."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from fastload.cli import exits
from fastload.cli.printing import print_json
from fastload.errors import ConfigError
from fastload.kernels import FIRST_BATCH, OF_DECODERS, compile_into, module_names, object_names


def compile_kernels(
    to: Annotated[
        Path | None,
        typer.Option(help="A folder that all users may read; else $FASTLOAD_KERNELS, or ~/.cache/fastload-kernels."),
    ] = None,
    decode: Annotated[
        list[str] | None, typer.Option(help="Only what a first batch needs with this decoder, such as image; several.")
    ] = None,
    everything: Annotated[bool, typer.Option("--all", help="All kernels, as without --decode.")] = False,
    level: Annotated[
        list[str] | None,
        typer.Option(help="Only for this level of processor, such as x86-64-v3, or here for this one's; several."),
    ] = None,
    status: Annotated[
        bool,
        typer.Option("--status", help="Only say what is compiled for this machine; exits with 3 where a job would."),
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="With --status: as JSON, for programs.")] = False,
) -> None:
    """Compile all kernels, for every level of processor, into a folder that may be put into an image."""
    from fastload.kernels import loading, objects

    if status:
        if to or decode or everything or level:
            raise ConfigError("--status compiles nothing, and takes no other option")
        _show_status(as_json)
        return
    if as_json:
        raise ConfigError("--json is for --status: compiling prints no data")
    if everything and decode:
        raise ConfigError(f"--all and --decode={decode[0]} exclude each other: leave one out")
    modules = _modules(decode) if decode else module_names()
    levels = [loading.level_here() if each == "here" else each for each in level or loading.LEVELS]
    for each in levels:
        if each not in loading.LEVELS:
            raise ConfigError(f"--level={each} is none of this machine's: {', '.join(loading.LEVELS)}, here")
    console = Console(stderr=True)
    try:
        folder = objects.users_folder() if to is None else to.resolve()
        with console.status("") as line:

            def show(module: str) -> None:
                line.update(f"compiling {module}")

            count = compile_into(folder, modules, levels, is_public=to is not None, on_unit=show)
    except (OSError, objects.UntrustedError) as error:
        raise ConfigError(f"no kernels can be kept there: {error}; name another folder with --to") from error
    console.print(f"{folder}: {count} object files compiled, for {', '.join(levels)}", soft_wrap=True)
    if to is not None:
        console.print(f"Set FASTLOAD_KERNELS={folder} where they are to be used", soft_wrap=True)


@dataclass(frozen=True, slots=True)
class KernelStatus:
    """What is compiled for this machine, and what the first job would compile, with the reason."""

    level: str
    module_count: int
    installed_count: int  # with fastload
    kept_count: int  # in the user's folder
    missing_count: int
    why_missing: str
    why_plain: str | None  # why numba compiles all of them in each user's first job
    c_unit: str | None  # where it is
    why_no_c_unit: str  # with the cure


def kernel_status() -> KernelStatus:
    """That of this machine's level of processor."""
    from fastload.decode import native
    from fastload.kernels import jit, loading, objects

    level, names = loading.level_here(), object_names(module_names(), loading.level_here())
    missing = [name for name in names if objects.find(name) is None]
    installed = sum((objects.INSTALLED / name).exists() for name in names)
    unit = native.path()
    return KernelStatus(
        level,
        len(names),
        installed,
        len(names) - installed - len(missing),
        len(missing),
        objects.why_not_installed(missing[0]) if missing else "",
        jit.why_plain("llvmlite", "numpy"),
        None if unit is None else str(unit),
        native.why_not() if unit is None else "",
    )


def _show_status(as_json: bool) -> None:
    from fastload.kernels import objects

    status = kernel_status()
    if as_json:
        print_json(asdict(status))
    elif status.why_plain is not None:
        print(f"kernels: numba compiles them in each user's first job, and keeps them, since {status.why_plain}")
    else:
        print(
            f"kernels: of {status.module_count} modules for {status.level}, {status.installed_count} are compiled in "
            f"{objects.INSTALLED}" + (f", {status.kept_count} in {objects.users_folder()}" if status.kept_count else "")
        )
        if status.missing_count:
            print(f"    the first job compiles {status.missing_count}, since {status.why_missing};")
            print("    `fastload compile` does it now")
    if not as_json:
        print(f"C unit: {status.c_unit}" if status.c_unit is not None else f"C unit: none, {status.why_no_c_unit}")
    if status.missing_count or status.why_plain is not None:
        raise typer.Exit(exits.PARTIAL)


def _modules(decoders: list[str]) -> list[str]:
    for each in decoders:
        if each not in OF_DECODERS:
            raise ConfigError(f"--decode={each} is none of the decoders with kernels: {', '.join(OF_DECODERS)}")
    return [*FIRST_BATCH, *(name for each in decoders for name in OF_DECODERS[each])]
