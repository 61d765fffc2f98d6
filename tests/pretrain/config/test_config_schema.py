"""JSON Schema for editors."""

import json

from trichord.config.schema import run_schema, suite_schema
from trichord.encoders.config import VisionConfig


def test_fields_carry_their_docstrings_and_limits():
    schema = run_schema()
    batches = schema["$defs"]["BatchesConfig"]["properties"]
    assert batches["rows_per_step"]["description"].startswith("Rows of the global batch.")
    assert batches["rows_per_step"]["minimum"] == 1
    assert schema["additionalProperties"] is False
    assert schema["$schema"].endswith("2020-12/schema")


def test_schemas_are_plain_json_and_name_all_rooms():
    assert set(json.loads(json.dumps(run_schema()))["properties"]) >= {"run", "shards", "engine", "tracking"}
    assert set(suite_schema()["properties"]) == {"name", "sources", "tasks"}
    assert VisionConfig.__name__ in run_schema()["$defs"]
