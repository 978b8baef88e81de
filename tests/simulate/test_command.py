"""`fastload simulate`: its table, its files, and what it refuses."""

from __future__ import annotations

import json
import math
from pathlib import Path
from xml.etree import ElementTree

import pytest
from typer.testing import CliRunner

from fastload.cli import app
from fastload.cli.simulate import cache_sizes
from fastload.errors import ConfigError

ARGUMENTS = """
    simulate --data-bytes 4GB --nodes 2 --ranks 2 --shard-bytes 32MB --rate 500 --epochs 2 --ram-bytes 256MiB
    --cache-bytes 50%,500MB
"""


def command(*arguments: str) -> str:
    """Run it; its output."""
    result = CliRunner().invoke(app, [*ARGUMENTS.split(), *arguments], env={"COLUMNS": "100"})
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.output


def test_a_table_and_files_of_the_same_figures(tmp_path: Path) -> None:
    json_file, plot_file = tmp_path / "found.json", tmp_path / "found.svg"
    output = command("--json", str(json_file), "--plot", str(plot_file))
    found = json.loads(json_file.read_text())
    runs = found["runs"]
    assert [run["node"]["disk_bytes"] for run in runs] == [500_000_000, 1_000_000_000]
    assert found["job"]["nodes"] == 2
    assert found["store"]["total_bytes_per_s"] is None
    for run, share in zip(runs, ("25%", "50%"), strict=True):
        (line,) = (line for line in output.splitlines() if share in line.split())
        assert f"{100 * run['epochs'][1]['hit_share']:.1f}" in line.split()
    assert "Simulated: 2 of 2 nodes" in " ".join(output.split())
    ElementTree.fromstring(plot_file.read_text())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--store", "mars"], "--store=mars is none of near, far, slow"),
        (["--cache-bytes", "much"], "--cache-bytes='much' is not a size"),
        (["--policy", "best"], "cache_policy='best'"),
        (["--shuffle", "some"], "shuffle='some'"),
        (["--data-bytes", "1MB"], "less than a batch"),
        (["--ram-bytes", "1MiB"], "ram_bytes='1MiB' is below two chunks"),
        (["--rate", "0"], "--rate=0.0 must be above 0"),
        (["--rate", "inf"], "--rate=inf must be above 0"),
        (["--nodes", "0"], "--nodes=0 must be above 0"),
        (["--simulated-nodes", "0"], "--simulated-nodes=0 must be above 0"),
        (["--throttles-above", "0"], "--throttles-above=0.0 must be above 0"),
        (["--first-byte-ms", "-1"], "--first-byte-ms=-1.0 must be 0 or more"),
        (["--slow-share", "2"], "--slow-share=2.0 must be between 0 and 1"),
        (["--chunk-bytes", "0"], "chunk_bytes=0 must be a multiple of 4096"),
        (["--link-rate", "0"], "--link-rate=0 must be above 0"),
        (["--json", "/no/where"], "--json=/no/where lies in /no, which is no directory"),
        (["--plot", "/"], "--plot=/ is a directory"),
    ],
)
def test_what_cannot_be_is_refused(arguments: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        command(*arguments)
    assert message in str(caught.value)


def test_what_has_too_little_ram_for_its_shards_is_told_so() -> None:
    output = " ".join(command("--ram-bytes", "64MiB", "--data-bytes", "1GB", "--shard-bytes", "256MB").split())
    assert "two shards of 244.1 MiB at a time are too much for 64.0 MiB; give --ram-bytes 976.6MiB" in output


def test_nothing_is_shown_of_caches_that_are_all_refused() -> None:
    output = " ".join(command("--cache-bytes", "1MB", "--plot", "not written").split())
    assert "disk_bytes='1MB' is below one chunk on disk" in output
    assert output.endswith("Nothing was simulated.")


def test_of_a_part_it_is_said_how_far_it_is_off() -> None:
    part = (
        "--data-bytes",
        "2TB",
        "--cache-bytes",
        "0",
        "--ram-bytes",
        "128MiB",
        "--epochs",
        "1",
        "--simulated-nodes",
        "1",
    )
    output = " ".join(command(*part).split())
    assert (
        "and 1.7% of their data and disk caches, with 128.0 MiB of RAM, which may hit 0.4% of the data more" in output
    )


def test_a_slow_disk_is_waited_for(tmp_path: Path) -> None:
    file = tmp_path / "found.json"
    command("--cache-bytes", "100%", "--disk-read-rate", "50MB", "--disk-write-rate", "1GB", "--json", str(file))
    (run,) = json.loads(file.read_text())["runs"]
    assert run["node"]["disk_read_bytes_per_s"] == 50_000_000
    assert run["epochs"][1]["stall_share"] > 0.3  # of 100 MB/s, few come from RAM


def test_caches_are_sizes_or_percent_of_what_a_node_reads() -> None:
    assert cache_sizes("50%, 1GB,10 %", 1e10) == [10**9, 5 * 10**9]
    assert math.isclose(cache_sizes("12.5%", 8e9)[0], 1e9)
