"""The daemon's configuration: what it means, and one sentence with the cure for all that is wrong with it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from fastload.daemon.config import Config, DataTable, data_table, read_config, storage_options_of
from fastload.errors import ConfigError

FULL = """
cache = "/nvme/fastload"
ram_bytes = "64GiB"
disk_bytes = "3TiB"
rest_after = "5m"
[warm]
bandwidth = "08:00 200MB/s, 20:00 off, Sat-Sun off"
requests_in_flight = 16
[[data]]
name = "imagenet"
urls = ["s3://bucket/imagenet/train-{000000..001023}.tar"]
job = {seed = 0, shuffle = "window", nodes = 8, node = "$SLURM_NODEID"}
credentials = "env"
when = "22:00-06:00"
watch = "60s"
deadline = "2h"
priority = 5
pin = true
ttl = "14d"
quota = "1TiB"
verify = "7d"
"""


def read(folder: Path, text: str, **environ: str) -> Config:
    path = folder / "fastload.toml"
    path.write_text(text)
    return read_config(path, environ)


def test_all_of_it_together(tmp_path: Path) -> None:
    config = read(tmp_path, FULL, SLURM_NODEID="3")
    assert config.limits == {"ram_bytes": 64 << 30, "disk_bytes": 3 << 40}
    assert config.rest_after_s == 300
    assert config.warm.timetable.rate_at(12 * 60) == 200_000_000
    assert config.warm.requests_in_flight == 16
    (table,) = config.data
    assert (table.job.node, table.job.nodes, table.job.shuffle) == (3, 8, "window")
    assert (table.watch_s, table.deadline_s, table.ttl_s, table.verify_s) == (60, 7200, 14 * 86400, 7 * 86400)
    assert table.quota_bytes == 1 << 40
    assert table.windows.is_open(23 * 60)
    assert not table.windows.is_open(12 * 60)


def test_nothing_at_all_is_a_daemon_without_jobs(tmp_path: Path) -> None:
    config = read(tmp_path, "")
    assert (config.data, config.limits, config.rest_after_s) == ([], {}, None)
    assert config.warm.timetable.rate_at(0) == 0


def test_variables(tmp_path: Path) -> None:
    text = '[[data]]\nname = "$NAME-${NAME}x$$y"\nurls = ["/$FOLDER/{0..3}.tar"]'
    (table,) = read(tmp_path, text, NAME="a", FOLDER="data").data
    assert (table.name, table.urls) == ("a-ax$y", ["/data/{0..3}.tar"])


def test_relative_paths_are_those_of_where_the_daemon_was_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A job's process runs in another folder."""
    monkeypatch.chdir(tmp_path)
    order = 'job = {index = "a.idx", manifest = "https://host/m.json"}'
    (table,) = read(tmp_path, f'[[data]]\nname = "a"\nurls = ["data/{{0..3}}.tar", "s3://b/a/", "/c/"]\n{order}').data
    assert table.urls == [f"{tmp_path}/data/{{0..3}}.tar", "s3://b/a/", "/c/"]
    assert (table.job.index, table.job.manifest) == (f"{tmp_path}/a.idx", "https://host/m.json")


DATA = '[[data]]\nname = "a"\nurls = ["s3://b/a/"]\n'


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("cach = 1", r"cach is no key; did you mean cache\?"),
        ("quota = 1", r"quota is no key; known are cache, "),
        ("[warm]\nbandwith = 1", r"warm\.bandwith is no key; did you mean bandwidth\?"),
        (DATA + "wach = '60s'", r"data\[0\]\.wach is no key; did you mean watch\?"),
        (DATA + "job = {sead = 1}", r"data\[0\]\.job\.sead is no key; did you mean seed\?"),
        (DATA + "priority = 'high'", r"data\[0\]\.priority: expected `int`, got `str`"),
        (DATA + "job = {shuffle = 'some'}", r"data\[0\]\.job\.shuffle: invalid enum value 'some'"),
        ("data = 3", r"data: expected `array`"),
        ('[[data]]\nname = "a"', r"data\[0\]: object missing required field `urls`"),
        ("ram_bytes = '64 elephants'", r"ram_bytes='64 elephants' is not a size"),
        ("rest_after = 'soon'", r'rest_after=\'soon\' is not a length of time; write "30s"'),
        ("warm = {bandwidth = 'fast'}", r"\[warm\]: bandwidth='fast' is not a rate"),
        (DATA + "when = '22:00'", r"\[\[data\]\] 1 \"a\": when='22:00' is not a time of day"),
        (DATA + "watch = '1ms'", r"watch='1ms' must be at least \"1s\""),
        (DATA + "when = 'once'\nwatch = '60s'", r'when="once" and watch exclude each other'),
        (DATA + "pin = true\nttl = 0", r"ttl=0\.0 must be more than 0; leave it out for no limit"),
        (DATA + "pin = true\nquota = '0'", r"quota='0' must be more than 0"),
        (DATA + "bandwidth = 0", r"bandwidth=0 must be more than 0"),
        (DATA + "priority = 10000000000000000000", r"priority=10000000000000000000 must be from -2\^31 to 2\^31"),
        (DATA + "job = {shuffle_window = 0}", r'shuffle_window=0 must be at least 1 byte, or "auto"'),
        ('[[data]]\nname = "a"\nurls = [""]', r"urls=\[''\] names no shard"),
        (DATA + "quota = '1TiB'", r"ttl and quota are those of a pin; add pin = true"),
        (DATA + "job = {node = 2, nodes = 2}", r"job: node=2 must be from 0 to nodes-1"),
        (DATA + "credentials = 'AKIAIOSFODNN7EXAMPLE'", r'credentials must be "env", "profile:NAME" or "file:PATH"'),
        (DATA + "credentials = 'file:'", r"credentials must be"),
        (DATA + "credentials = 'file:a.toml'", r"must be an absolute path"),
        ('[[data]]\nname = "a"\nurls = ["~/a.tar"]', r"write the whole path, such as \$HOME/data/"),
        ('[[data]]\nname = ""\nurls = ["/a"]', r"name='' must be 1 to 200 printable characters"),
        ('[[data]]\nname = "a"\nurls = []', r"urls is empty"),
        ('[[data]]\nname = "a"\nurls = ["/a/{1..3.tar"]', r"its braces do not match"),
        ('[[data]]\nname = "a"\nurls = ["https://u:geheim@host/a.tar"]', r"holds a secret"),
        (DATA + DATA, r'two \[\[data\]\] tables are called "a"'),
        (DATA + 'job = {node = "$NOT_THERE"}', r"data\[0\]\.job\.node='\$NOT_THERE': the environment has no variable"),
        ("cache = ", r"it is no TOML"),
    ],
)
def test_what_is_wrong_is_one_line(tmp_path: Path, text: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says) as caught:
        read(tmp_path, text)
    message = str(caught.value)
    assert message.startswith(f"{tmp_path / 'fastload.toml'}: ")
    assert "\n" not in message
    assert "geheim" not in message
    assert "AKIA" not in message


@pytest.mark.parametrize(
    ("first", "second", "is_one"),
    [
        ("s3://b/train-{00..09}.tar", "s3://b/train-{08..12}.tar", True),
        ("s3://b/data/", "s3://b/data/train/", True),
        ("s3://b/data/", "s3://b/data/x.tar", True),
        ("s3://b/data/x.tar", "s3://b/data/", True),
        ("s3://b/data/", "s3://b/data-2/", False),
        ("s3://b/train-{00..09}.tar", "s3://b/train-{10..12}.tar", False),
    ],
)
def test_overlapping_data_sets(tmp_path: Path, first: str, second: str, is_one: bool) -> None:
    text = f'[[data]]\nname = "one"\nurls = ["{first}"]\n[[data]]\nname = "two"\nurls = ["{second}"]'
    if not is_one:
        assert len(read(tmp_path, text).data) == 2
        return
    with pytest.raises(ConfigError, match=r'the data sets "(one|two)" and "(one|two)" overlap: both hold s3://b/'):
        read(tmp_path, text)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none.toml: it cannot be read: No such file"):
        read_config(tmp_path / "none.toml", {})


# Credentials


def test_where_credentials_are(tmp_path: Path) -> None:
    path = tmp_path / "secret.toml"
    path.write_text('access_key_id = "me"\nsecret_access_key = "geheim"')
    path.chmod(0o600)
    assert storage_options_of(f"file:{path}") == {"access_key_id": "me", "secret_access_key": "geheim"}
    assert storage_options_of("profile:prod") == {"profile": "prod"}
    assert storage_options_of("env") == {}


@pytest.mark.parametrize("mode", [0o644, 0o640, 0o604, 0o660])
def test_credentials_that_others_may_read(tmp_path: Path, mode: int) -> None:
    path = tmp_path / "secret.toml"
    path.write_text('secret_access_key = "geheim"')
    path.chmod(mode)
    with pytest.raises(ConfigError, match=rf"others may read it \(mode {mode:04o}\); run chmod 600") as caught:
        storage_options_of(f"file:{path}")
    assert "geheim" not in str(caught.value)


def test_credentials_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="it cannot be read: No such file"):
        storage_options_of(f"file:{tmp_path / 'none'}")
    path = tmp_path / "secret.toml"
    path.write_text("secret_access_key = geheim")
    path.chmod(0o600)
    with pytest.raises(ConfigError, match="it is no TOML") as caught:
        storage_options_of(f"file:{path}")
    assert "geheim" not in str(caught.value)


# Submitted


def test_a_submitted_table_is_taken_literally() -> None:
    table = data_table({"name": "a", "urls": ["/data/$HOME.tar"]}, None)
    assert table.urls == ["/data/$HOME.tar"]
    with pytest.raises(ConfigError, match=r"nam is no key; did you mean name\?"):
        data_table({"nam": "a"}, None)
    assert data_table({"name": "a", "urls": ["$HOME/"]}, os.environ).urls == [os.environ["HOME"] + "/"]
    assert isinstance(table, DataTable)
