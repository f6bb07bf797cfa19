"""The server does what its OpenAPI document says, tried with requests that are made from it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import httpx2
import pytest
from hypothesis import HealthCheck, settings

from fastmtp.serve.openapi import document
from tests.serve.serving import FakeScheduler, service, serving

schemathesis = pytest.importorskip("schemathesis")
from schemathesis.specs.openapi.checks import positive_data_acceptance  # noqa: E402

schema = schemathesis.openapi.from_dict(document())


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    loaded = service(FakeScheduler(reply="ok"))
    with serving(lambda: loaded) as address:
        yield address


def test_the_server_shows_it(url: str) -> None:
    assert httpx2.get(url + "/openapi.json").json() == document()


@schema.parametrize()
@settings(max_examples=10, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
def test_requests_made_from_it(case: Any, url: str) -> None:
    """No faults, no status or type that it does not name, and errors in the shape that it gives."""
    # The document does not know the model: which token ids there are, what its context holds.
    case.call_and_validate(base_url=url, excluded_checks=[positive_data_acceptance])


@pytest.mark.slow
@schema.parametrize()
@settings(max_examples=400, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
def test_many_requests_made_from_it(case: Any, url: str) -> None:
    case.call_and_validate(base_url=url, excluded_checks=[positive_data_acceptance])
