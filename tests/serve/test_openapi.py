"""Does the OpenAPI document say what the routes do? Held against them by schemathesis, with any bodies."""

from __future__ import annotations

from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis import GenerationMode, checks
from schemathesis.specs.openapi import checks as openapi_checks

from tests.serve.tiny_server import RunningServer

BODIES = {
    "/v1/completions": "CompletionBody",
    "/v1/chat/completions": "ChatBody",
    "/v1/embeddings": "EmbeddingBody",
    "/tokenize": "TokenizeBody",
    "/detokenize": "DetokenizeBody",
}
# That any generated body is refused or answered, as documented, and never by a failure of ours.
CHECKS: list[Any] = [
    checks.not_a_server_error,
    openapi_checks.status_code_conformance,
    openapi_checks.content_type_conformance,
    openapi_checks.response_schema_conformance,
]


def document(server: RunningServer) -> dict[str, Any]:
    return server.client.get("/openapi.json").json()


def test_every_body_is_described(tiny: RunningServer) -> None:
    found = document(tiny)
    schemas = found["components"]["schemas"]
    for path, name in BODIES.items():
        content = found["paths"][path]["post"]["requestBody"]["content"]
        assert content["application/json"]["schema"] == {"$ref": f"#/components/schemas/{name}"}
        assert schemas[name]["additionalProperties"] is False
    assert "prompt" in schemas["CompletionBody"]["properties"]
    assert "text/event-stream" in found["paths"]["/v1/completions"]["post"]["responses"]["200"]["content"]


def test_operations_are_told_apart(tiny: RunningServer) -> None:
    paths = document(tiny)["paths"]
    ids = [operation["operationId"] for path in paths.values() for operation in path.values()]
    assert len(ids) == len(set(ids)) >= 12
    answers = {"/health": {"200", "401", "503"}, "/v1/models": {"200", "401"}}
    assert all(set(paths[path]["get"]["responses"]) == found for path, found in answers.items())


def test_documentation_pages_are_off_unless_asked_for(tiny: RunningServer) -> None:
    assert tiny.client.get("/docs").status_code == 404 and tiny.client.get("/redoc").status_code == 404


def run_schemathesis(server: RunningServer, max_examples: int) -> int:
    """Send bodies that fit the document, and some that do not; returns how many were sent."""
    schema = schemathesis.openapi.from_url(f"{server.url}/openapi.json")
    count = [0]

    def hold(strategy: Any) -> None:
        @settings(
            max_examples=max_examples,
            deadline=None,
            derandomize=True,
            database=None,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        @given(case=strategy)
        def holds(case: Any) -> None:
            count[0] += 1
            case.call_and_validate(checks=CHECKS, timeout=60)

        holds()

    for result in schema.get_all_operations():
        operation = result.ok()
        if operation.path in BODIES:
            for mode in (GenerationMode.POSITIVE, GenerationMode.NEGATIVE):
                hold(operation.as_strategy(generation_mode=mode))
    return count[0]


def test_generated_bodies_are_answered_as_documented(tiny: RunningServer) -> None:
    assert run_schemathesis(tiny, 7) > 35
    tiny.wait_idle()


@pytest.mark.slow
def test_many_generated_bodies_are_answered_as_documented(tiny: RunningServer) -> None:
    assert run_schemathesis(tiny, 500) > 2000
    tiny.wait_idle()
