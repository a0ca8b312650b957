"""Health: says which part does not answer. Real servers, addressed where nobody listens."""

import pytest
from django.db import connection
from django.test import Client

pytestmark = pytest.mark.django_db


def test_all_well():
    response = Client().get("/api/v1/health")
    assert response.json() == {"status": "ok", "database": "ok", "redis": "ok"}


def test_without_redis(settings):
    settings.CACHES = {"default": {**settings.CACHES["default"], "LOCATION": "redis://127.0.0.1:1/0"}}
    response = Client().get("/api/v1/health")
    body = response.json()
    assert (response.status_code, body["code"], body["retry"]) == (503, "service_unavailable", "same_key")
    assert (body["database"], body["redis"]) == ("ok", "does not answer")


@pytest.mark.django_db(transaction=True)
def test_without_the_database():
    connection.close()
    port, connection.settings_dict["PORT"] = connection.settings_dict["PORT"], 1
    try:
        response = Client().get("/api/v1/health")
    finally:
        connection.close()
        connection.settings_dict["PORT"] = port
    assert response.status_code == 503
    assert response.json()["database"] == "does not answer"
