"""Every report fits the JSON Schema that is shipped, and the schema describes every key of a report."""

from __future__ import annotations

import json
from importlib import resources
from typing import TYPE_CHECKING, Any

import jsonschema
import pytest
from report_material import judge, make_samples

from dfadc.verification.report import SCHEMA

if TYPE_CHECKING:
    from command_line import Outcome

    from dfadc.run_folder import RunFolder
    from dfadc.verification.report import Report


def closed(schema: Any) -> Any:
    """The schema without leave to add keys, so that one which nobody has described is found."""
    if isinstance(schema, list):
        return [closed(entry) for entry in schema]
    if not isinstance(schema, dict):
        return schema
    known = {name: closed(value) for name, value in schema.items()}
    return known | ({"additionalProperties": False} if "properties" in schema and "type" in schema else {})


@pytest.fixture(scope="module")
def validator() -> jsonschema.Draft202012Validator:
    text = (resources.files("dfadc.reporting") / "report.schema.json").read_text(encoding="utf-8")
    schema = json.loads(text)
    jsonschema.Draft202012Validator.check_schema(schema)
    assert schema["$id"] == schema["properties"]["schema"]["const"] == SCHEMA
    return jsonschema.Draft202012Validator(closed(schema))


@pytest.fixture
def report() -> Report:
    return judge(make_samples())


def test_a_report_fits(report: Report, validator: jsonschema.Draft202012Validator) -> None:
    validator.validate(report)


def test_what_the_commands_print_fits(
    command_run: tuple[RunFolder, Outcome], finished_run: RunFolder, validator: jsonschema.Draft202012Validator
) -> None:
    validator.validate(json.loads(command_run[1].out))
    validator.validate(json.loads(finished_run.report_json.read_text()))


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("schema",), "dfadc.verification/2"),
        (("verdict",), "OK"),
        (("exit_code",), 1),
        (("undescribed",), 1),
        (("gate", "undescribed"), 1),
        (("student", "agreement"), 1.5),
        (("artifacts", "student.onnx", "comparisons", "A", "all", "n"), -1),
        (("artifacts", "student.onnx", "checks", 0, "comparison"), "F"),
        (("artifacts", "student.onnx", "verdict"), None),
        (("samples", "sha256"), "short"),
        (("baseline",), {}),
    ],
)
def test_what_is_no_report_does_not(
    path: tuple[Any, ...], value: object, report: Report, validator: jsonschema.Draft202012Validator
) -> None:
    *parents, last = path
    place: Any = report
    for name in parents:
        place = place[name]
    place[last] = value
    with pytest.raises(jsonschema.ValidationError):
        validator.validate(report)


def test_no_key_may_be_left_out(report: Report, validator: jsonschema.Draft202012Validator) -> None:
    for name in report:
        without = {key: value for key, value in report.items() if key != name}
        assert not validator.is_valid(without), name
