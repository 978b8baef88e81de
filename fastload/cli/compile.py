"""`fastload compile`: compile the kernels before any job runs, for images and for machines without a wheel."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from fastload.cli import exits
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
) -> None:
    """Compile all kernels, for every level of processor, into a folder that may be put into an image."""
    from fastload.kernels import loading, objects

    if status:
        if to or decode or everything or level:
            raise ConfigError("--status compiles nothing, and takes no other option")
        _show_status()
        return
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


def _show_status() -> None:
    """The kernels of this machine's level, and the C unit: where they are, or why not and what helps."""
    from fastload.kernels import jit, loading, objects

    why = jit.why_plain("llvmlite", "numpy")
    if why is not None:
        print(f"kernels: numba compiles them in each user's first job, and keeps them, since {why}")
        _show_c_unit()
        raise typer.Exit(exits.PARTIAL)
    level, names = loading.level_here(), object_names(module_names(), loading.level_here())
    missing = [name for name in names if objects.find(name) is None]
    installed = sum((objects.INSTALLED / name).exists() for name in names)
    kept = len(names) - installed - len(missing)
    print(f"kernels: of {len(names)} modules for {level}, {installed} are compiled in {objects.INSTALLED}", end="")
    print(f", {kept} in {objects.users_folder()}" if kept else "")
    if missing:
        print(f"    the first job compiles {len(missing)}, since {objects.why_not_installed(missing[0])};")
        print("    `fastload compile` does it now")
    _show_c_unit()
    if missing:
        raise typer.Exit(exits.PARTIAL)


def _show_c_unit() -> None:
    from fastload.decode import native

    unit = native.path()
    print(f"C unit: {unit}" if unit is not None else f"C unit: none, {native.why_not()}")


def _modules(decoders: list[str]) -> list[str]:
    for each in decoders:
        if each not in OF_DECODERS:
            raise ConfigError(f"--decode={each} is none of the decoders with kernels: {', '.join(OF_DECODERS)}")
    return [*FIRST_BATCH, *(name for each in decoders for name in OF_DECODERS[each])]
