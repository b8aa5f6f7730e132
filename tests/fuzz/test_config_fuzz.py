"""Whatever stands in configuration files and flags: a Config or a ConfigError."""

from __future__ import annotations

import tomli_w
from damage import fuzz
from hypothesis import given
from hypothesis import strategies as st
from support import ROOT

from train.config_sources import ConfigError, load_config, schema_keys
from train.run_folder import RunFolder, RunFolderError

KEYS = [*sorted(key for key, _ in schema_keys()), "transforms", "data.sources", "model", "include", "no.such"]
FILES = sorted((ROOT / "configs").rglob("*.toml"))
numbers = st.sampled_from(
    [0, 1, -1, 2, 3, 64, 0.5, 1e-3, 1e9, 1e300, float("inf"), float("nan"), 2**63, 10**400, -(10**20)]
)
texts = st.text(max_size=12) | st.sampled_from(
    ["auto", "none", "files", "hf:x", "60M", "muon", "\x00", "../..", "s3://a:b@c"]
)
leaves = st.booleans() | numbers | texts
tables = st.dictionaries(
    st.sampled_from(
        ["kind", "weight", "input", "source", "paths", "modules", "rank", "alpha", "storage", "mantissa", "bits"]
    )
    | st.text(max_size=5),
    st.sampled_from(["bitflip", "lora", "files", "re:(", "*"])
    | leaves
    | st.lists(leaves, max_size=2)
    | st.dictionaries(st.sampled_from(["mantissa", "bits", "sign_exponent", "zero_above"]), leaves, max_size=2),
    max_size=4,
)
values = leaves | st.lists(leaves, max_size=3) | tables | st.lists(tables, max_size=3)


def only_config_errors(files: list, flags: list[str], world_size: int | None) -> None:
    try:
        load_config([str(file) for file in files], flags, world_size)
    except ConfigError:
        return


def nested(settings: dict[str, object]) -> dict:
    """A TOML table of dotted keys; a later one replaces a value in its way."""
    out: dict = {}
    for key, value in settings.items():
        table, *_ = [out]
        *parents, last = key.split(".")
        for part in parents:
            if not isinstance(table.get(part), dict):
                table[part] = {}
            table = table[part]
        table[last] = value
    return out


def test_any_text_in_a_file(tmp_path):
    file = tmp_path / "a.toml"

    @fuzz(100)
    @given(
        st.text(max_size=60).map(str.encode)
        | st.binary(max_size=40)
        | st.sampled_from(
            [b"a = " + b"[" * 50_000, b"[" + b"a." * 5000 + b"a]", b"a = " + b"{a=" * 5000, b"x = " + b"9" * 9999]
        )
        | st.tuples(
            st.sampled_from(FILES).map(lambda path: path.read_bytes()), st.integers(0, 3000), st.binary(max_size=5)
        ).map(lambda cut: cut[0][: cut[1]] + cut[2] + cut[0][cut[1] + 1 :])
    )
    def check(text):
        file.write_bytes(text)
        only_config_errors([file], [], None)

    check()


def test_any_settings_in_files(tmp_path):
    first, second = tmp_path / "a.toml", tmp_path / "b.toml"

    @fuzz(120)
    @given(st.dictionaries(st.sampled_from(KEYS), values, max_size=4), st.dictionaries(st.sampled_from(KEYS), values, max_size=2),
           st.sampled_from([None, 1, 2, 6, 8]))  # fmt: skip
    def check(settings, more, world_size):
        first.write_text(tomli_w.dumps(nested(settings)), encoding="utf-8", errors="replace")
        second.write_text(tomli_w.dumps(nested(more)), encoding="utf-8", errors="replace")
        only_config_errors([first, second], [], world_size)

    check()


def test_any_flags():
    words = texts | st.sampled_from(["--", "--=", "-x", "true", "[]", "{}", "[" * 3000, "1e9", '"', "[[1]]", "{a=1}"])
    flags = st.sampled_from(KEYS).map(lambda key: f"--{key}") | st.text(max_size=8).map(lambda text: f"--{text}")
    paths = st.sampled_from(
        ["--data.sources.0.paths", "--transforms.0.kind", "--a..b", "--.", "--model.size.x", "--data.paths.1"]
    )

    @fuzz(100)
    @given(st.lists(flags | words | paths, max_size=6), st.sampled_from([[], ["no such file"], ["\x00"], ["/"]]))
    def check(arguments, files):
        only_config_errors(files, arguments, 1)

    check()


def test_the_stored_configuration_of_a_run(tmp_path):
    folder = RunFolder(tmp_path)
    folder.write_config(load_config([], [], 1))
    good = folder.config_file.read_bytes()

    @fuzz(100)
    @given(st.integers(0, len(good) - 1), st.binary(min_size=0, max_size=4))
    def check(place, change):
        folder.config_file.write_bytes(good[:place] + change + good[place + 1 :])
        try:
            folder.read_config()
        except RunFolderError:
            return

    check()
