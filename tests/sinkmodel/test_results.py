"""Guards the files of `sink-eval --json`: reading and writing loses nothing, and a wrong file is one clear line."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from sinkmodel.errors import UserError
from sinkmodel.files import read_json
from sinkmodel.results.attention import BirthResult, SinksResult
from sinkmodel.results.files import COMMANDS, KINDS, content_of, read_result, result_of, write_result
from sinkmodel.results.parts import SCHEMA
from sinkmodel.results.perplexity import PerplexityResult
from sinkmodel.results.schema import Mismatch, Number, from_json, named, omitted, to_json
from sinkmodel.results.streams import LinesResult, QuestionsResult
from tests import results

PATH = Path("x.json")


@dataclass(frozen=True, kw_only=True)
class Inner:
    count: int
    name: str | None = omitted()


@dataclass(frozen=True, kw_only=True)
class Outer:
    start: int = named("from")
    share: Number
    margin: float = 0.5
    inner: list[Inner]
    bins: list[tuple[int, Number]]
    by_name: dict[str, bool]


WHOLE = {"from": 1, "share": 0.25, "margin": 2, "inner": [{"count": 3}], "bins": [[0, None]], "by_name": {"a": True}}


def test_a_record_is_read_as_it_was_written():
    record = Outer(start=1, share=0.25, margin=2, inner=[Inner(count=3)], bins=[(0, None)], by_name={"a": True})
    assert to_json(record) == WHOLE
    assert list(to_json(record)) == list(WHOLE)
    assert from_json(Outer, json.loads(json.dumps(WHOLE))) == record


def test_what_older_versions_did_not_write_may_be_missing_and_what_is_unknown_is_ignored():
    older = {key: value for key, value in WHOLE.items() if key != "margin"} | {"later": 1}
    assert from_json(Outer, older).margin == 0.5


def test_a_measured_number_that_is_not_finite_was_not_measured():
    assert from_json(Outer, WHOLE | {"share": math.nan}).share is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"from": True}, "from is not a whole number"),
        ({"share": "0.1"}, "share is not a number or null"),
        ({"margin": math.inf}, "margin is not a number"),
        ({"margin": None}, "margin is not a number"),
        ({"inner": {}}, "inner is not a list"),
        ({"inner": [1]}, r"inner\[0\] is not an object"),
        ({"inner": [{}]}, r"inner\[0\] has no count"),
        ({"inner": [{"count": 1, "name": 2}]}, r"inner\[0\].name is not a text or null"),
        ({"bins": [[0, 1, 2]]}, r"bins\[0\] is not a list of 2"),
        ({"by_name": {"a": 1}}, "by_name.a is not true or false"),
    ],
)
def test_the_first_wrong_place_is_named(change, message):
    with pytest.raises(Mismatch, match=f"^{message}$"):
        from_json(Outer, WHOLE | change)


# -------------------------------------------------------------------------------------------------------------- results


@pytest.mark.parametrize("name", results.everything())
def test_a_file_without_a_version_is_read_and_nothing_is_lost(tmp_path, name):
    """Guards the files that exist, and old readers: all keys are those of before, with the version beside them."""
    before = json.loads(json.dumps(results.everything()[name]))
    assert "schema_version" not in before
    result = result_of(before, PATH)
    after = content_of(result)
    assert after["schema_version"] == SCHEMA
    assert_within(before, after)
    write_result(tmp_path / "again.json", result)
    assert read_json(tmp_path / "again.json") == after
    assert read_result(tmp_path / "again.json") == result


def assert_within(part, whole):
    """Every entry of `part` is in `whole`, with the same value."""
    if isinstance(part, dict):
        for key, value in part.items():
            assert_within(value, whole[key])
    elif isinstance(part, list):
        assert len(part) == len(whole)
        for one, other in zip(part, whole):
            assert_within(one, other)
    else:
        assert part == whole


def test_every_kind_of_result_is_in_the_samples():
    kinds = {type(result_of(content, PATH)) for content in results.everything().values()}
    assert kinds == set(KINDS)
    assert {LinesResult, QuestionsResult, SinksResult, BirthResult} <= kinds
    assert len(COMMANDS) == len(KINDS) - 2


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([], "is not a result of sink-eval --json: its command is None, not one of ppl, verify"),
        ({"command": ["ppl"]}, r"its command is \['ppl'\]"),
        ({"command": "ppl"}, "is not what sink-eval ppl --json writes: it has no model; measure it again"),
        ({**results.ppl(), "rows": []}, "has no rows: nothing was measured"),
        ({**results.ppl(), "schema_version": SCHEMA + 1}, "with schema version 2, and this sinkmodel reads version 1"),
        ({**results.ppl(), "schema_version": "1"}, "with schema version '1'"),
    ],
)
def test_a_file_of_another_kind_is_refused_in_one_line(content, message):
    with pytest.raises(UserError, match=message) as error:
        result_of(content, PATH)
    assert "\n" not in str(error.value)
    assert str(error.value).startswith("x.json ")


def test_a_folder_and_a_file_that_is_nested_too_deeply_are_refused(tmp_path):
    with pytest.raises(UserError, match="is a folder"):
        read_result(tmp_path)
    (tmp_path / "deep.json").write_text('{"command": ' + 100_000 * "[" + 100_000 * "]" + "}")
    with pytest.raises(UserError, match="nested too deeply"):
        read_result(tmp_path / "deep.json")


def test_the_stamp_comes_last():
    result = result_of(results.ppl(), PATH)
    assert isinstance(result, PerplexityResult)
    keys = list(content_of(replace(result, command_line="sink-eval ppl")))
    assert keys[:3] == ["command", "schema_version", "model"]
    assert keys[-3:] == ["command_line", "date", "versions"]


def test_reading_a_result_needs_no_model_code():
    """Risk: `sink-push`, `sink-log` and slurm/collect.py import torch for a table."""
    program = "import sys, sinkmodel.results.files; print(*({'torch', 'transformers', 'numpy'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []
